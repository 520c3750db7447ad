"""Thirty runs of the command line, killed at random moments, in the middle of writes too; each goes on, perhaps to be
killed again, and ends bit for bit as the undisturbed run did."""

import csv
import json
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import yaml

import forked

pytestmark = pytest.mark.slow
RUNS, AT_ONCE = 30, 3
TENSORS = "adapter/adapter_model.safetensors"
Moment = Callable[[Path, ForkServerProcess], None]
"""Waits for the moment to kill, given a working folder."""


def config(encoder: Path) -> dict[str, Any]:
    phases = {"initial_phase": 5, "final_phase": 5, "interval": 2}
    strategy = {"class_path": "AdaLoRA", "init_args": {"init_r": 4, "target_r": 2, "dropout": 0.2, **phases}}
    return {
        "model": {"class_path": "SequenceClassification",
                  "init_args": {"base_model": str(encoder), "strategy": strategy}},
        "data": {"class_path": "SST2", "init_args": {"source": "rows.jsonl", "batch_size": 4, "validation_size": 8}},
        "optimizer": {"class_path": "AdamW", "init_args": {"lr": 0.01}},
        "trainer": {"accelerator": "cpu", "max_epochs": 3, "accumulate_grad_batches": 2, "log_every_n_steps": 1,
                    "enable_progress_bar": False, "callbacks": [
                        {"class_path": "peftlight.callbacks.Checkpoints", "init_args": {"minutes": 0}}]},
    }  # fmt: skip


def working_folder(folder: Path, encoder: Path) -> Path:
    folder.mkdir()
    rows = [{"sentence": f"word {number * 7 % 13} again", "label": number % 2} for number in range(70)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "run.yaml").write_text(yaml.safe_dump(config(encoder)))
    return folder


def only_run(folder: Path) -> Path:
    (run,) = (folder / "runs").iterdir()
    return run


def result(folder: Path) -> tuple[bytes, str, list[dict[str, str]]]:
    run = only_run(folder)
    with open(run / "metrics.csv", newline="") as file:
        rows = [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in csv.DictReader(file)]
    assert json.loads((run / "run.json").read_text())["state"] == "finished"
    return (run / TENSORS).read_bytes(), (run / "adapter" / "adapter_config.json").read_text(), rows


def until(there: Callable[[], bool], process: ForkServerProcess) -> None:
    while forked.is_alive(process) and not there():
        time.sleep(0.0003)


def rows_of(folder: Path) -> int:
    files = list(folder.glob("runs/*/metrics.csv"))
    return files[0].read_bytes().count(b"\n") if files else 0


def some_time_after_a_row(chance: random.Random) -> Moment:
    more, wait = chance.randrange(20), chance.random() * 0.05

    def moment(folder: Path, process: ForkServerProcess) -> None:
        before = rows_of(folder)
        until(lambda: rows_of(folder) > before + more, process)
        time.sleep(wait)

    return moment


def while_a_checkpoint_is_written(chance: random.Random) -> Moment:
    which = chance.randrange(1, 15)

    def moment(folder: Path, process: ForkServerProcess) -> None:
        seen = set[int]()

        def enough() -> bool:
            for path in folder.glob("runs/*/checkpoints/.*.tmp"):
                try:
                    seen.add(path.stat().st_ino)
                except FileNotFoundError:
                    continue
            return len(seen) >= which

        until(enough, process)

    return moment


def at_the_end(chance: random.Random) -> Moment:
    wait = chance.random() * 0.3

    def moment(folder: Path, process: ForkServerProcess) -> None:
        until(lambda: any(folder.glob("runs/*/adapter")), process)
        time.sleep(wait)

    return moment


MOMENTS = (some_time_after_a_row, while_a_checkpoint_is_written, while_a_checkpoint_is_written, at_the_end)


def killed(folder: Path, given: list[str], moment: Moment) -> bool:
    """Whether the process was still there to be killed."""
    process = forked.start(["fit", *given], folder)
    moment(folder, process)
    process.kill()
    forked.join(process)
    said = (folder / "out.txt").read_text()
    assert process.exitcode in (0, -9) or "is finished" in said, said  # it may have been killed on its last line
    return process.exitcode == -9


def killed_and_resumed(folder: Path, chance: random.Random) -> tuple[int, int]:
    """How often it was killed, and how often in the middle of a write."""
    kills = torn = 0
    given = ["--config", "run.yaml"]
    for _ in range(chance.choice([1, 1, 1, 2])):
        if not killed(folder, given, chance.choice(MOMENTS)(chance)):
            break
        kills += 1
        torn += any(folder.glob("runs/*/**/.*.tmp")) or any(folder.glob("runs/*/**/.*.new"))
        saved = any(folder.glob("runs/*/checkpoints/*.ckpt"))
        given = ["--resume", "--config", "run.yaml"] if saved else given
        if not saved:
            for run in folder.glob("runs/*"):
                run.rename(folder / f"nothing-{kills}")
    else:
        code, said = forked.peftlight(["fit", *given], folder)
        assert code == 0 or "is finished" in said, said
    return kills, torn


def test_killed_runs_end_as_the_undisturbed_one(tmp_path: Path, encoder: Path) -> None:
    undisturbed = working_folder(tmp_path / "undisturbed", encoder)
    code, said = forked.peftlight(["fit", "--config", "run.yaml"], undisturbed)
    assert code == 0, said
    expected = result(undisturbed)
    assert len(expected[2]) == 24 + 3  # a row for each optimizer step and each validation

    def one(number: int) -> tuple[int, int]:
        folder = working_folder(tmp_path / str(number), encoder)
        counts = killed_and_resumed(folder, random.Random(number))
        assert result(folder) == expected, f"run {number}"
        return counts

    with ThreadPoolExecutor(AT_ONCE) as pool:
        counts = list(pool.map(one, range(RUNS)))
    kills, torn = map(sum, zip(*counts, strict=True))
    assert kills >= RUNS
    assert torn > 0
