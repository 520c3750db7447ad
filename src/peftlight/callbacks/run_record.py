"""The run folder: what was asked for, what happened, and what was trained."""

import importlib.metadata
import json
import logging
import math
import platform
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from peftlight.callbacks.curves import draw_curves
from peftlight.console import say, stop_log, write_log_to
from peftlight.errors import UserError
from peftlight.files import write_text
from peftlight.handover.model_card import write_card
from peftlight.interop import save_adapter
from peftlight.quantization import held
from peftlight.report import rows_of, table_of
from peftlight.tasks import PEFTModule

_PACKAGES = ("peftlight", "torch", "lightning", "transformers", "tokenizers", "datasets", "bitsandbytes",
             "torchmetrics", "jsonargparse", "safetensors")  # fmt: skip


class RunRecord(Callback):
    """Keeps config.yaml, run.json, log.txt, metrics.csv, curves.png and adapter/ in the run's own folder."""

    def __init__(self, folder: Path, config: str, command: list[str], seed: int | None) -> None:
        """
        Args:
            folder: the run folder; metrics.csv is written there by the logger.
            config: the resolved configuration as YAML.
            command: the command line that started the run.
            seed: the seed of all random numbers.
        """
        self.folder, self.config = folder, config
        self.record: dict[str, Any] = {"command": command, "seed": seed, "python": platform.python_version()}
        self._started, self._training_since = time.time(), time.monotonic()
        self._log: logging.Handler | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not trainer.is_global_zero or self._log is not None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._log = write_log_to(self.folder / "log.txt")
        write_text(self.folder / "config.yaml", self.config)
        datamodule = getattr(trainer, "datamodule", None)
        self.record |= {
            "versions": {name: _version(name) for name in _PACKAGES},
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(self._started)),
            "processes": trainer.world_size,
            "precision": trainer.precision,
            "data_fingerprint": getattr(datamodule, "fingerprint", None),
            "data": {split: _plain(s) for split, s in (getattr(datamodule, "summaries", None) or {}).items()},
        }
        self._write("running")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and isinstance(pl_module, PEFTModule):
            assert pl_module.adapter is not None
            if pl_module.quantization is not None:
                assert pl_module.model is not None
                say(f"the base in {pl_module.quantization}: {held(pl_module.model)}")
            say(table_of(pl_module.adapter))
            say(_plan(trainer, pl_module))
            self.record["trained"] = [_plain(row) for row in rows_of(pl_module.adapter)]
            self._write("running")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._training_since = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.record["training_seconds"] = round(time.monotonic() - self._training_since, 2)  # up to the last batch

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero or not isinstance(pl_module, PEFTModule):
            return
        assert pl_module.adapter is not None
        verdict = pl_module.audit()
        say(str(verdict))
        self.record["audit"] = {**_plain(verdict), "trained": [_plain(tensor) for tensor in verdict.trained]}
        if not getattr(trainer, "fast_dev_run", 0):
            save_adapter(pl_module.adapter, self.folder / "adapter", self._of_the_adapter(trainer, pl_module))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.is_global_zero and self._log is not None:
            self._finish(trainer, "interrupted" if trainer.interrupted else "finished")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if trainer.is_global_zero and self._log is not None:
            self.record["error"] = f"{type(exception).__name__}: {exception}"
            cause = (type(exception), exception, exception.__traceback__)
            self._log.handle(logging.LogRecord("peftlight", logging.ERROR, "", 0, "the run failed", None, cause))
            self._finish(trainer, "interrupted" if isinstance(exception, KeyboardInterrupt) else "failed")

    def _of_the_adapter(self, trainer: Trainer, module: PEFTModule) -> dict[str, Any]:
        """What is kept with the adapter, wherever its folder goes; laid out as `peftlight.interop.Record`."""
        data: Any = getattr(trainer, "datamodule", None)
        source = getattr(data, "source", None)
        quantization = module.quantization
        values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        return {
            "base": {
                "auto_class": module.auto_class,
                "quantization": quantization and quantization.described(),
                **(_plain(module.source) if module.source else {}),
            },
            "task": type(module).__name__,
            "label_names": getattr(module, "label_names", None),
            "data": {
                "source": source and str(source),
                "fingerprint": self.record.get("data_fingerprint"),
                "encoder": data.encoder("predict", None).settings() if hasattr(data, "encoder") else None,
            },
            "metrics": {name: value if math.isfinite(value) else None for name, value in values.items()},
            "steps": trainer.global_step,
            "seed": None if self.record["seed"] is False else self.record["seed"],  # false: none was asked for
        }

    def _finish(self, trainer: Trainer, state: str) -> None:
        assert self._log is not None
        for logger in trainer.loggers:
            logger.save()
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.record |= {"seconds": round(time.time() - self._started, 1), "metrics": metrics}
        self._write(state)
        if trainer.state.fn == "fit":
            self._describe()
        say(f"{state}; run folder: {self.folder}")
        stop_log(self._log)
        self._log = None

    def _describe(self) -> None:
        """The picture and the card; what keeps them from being made is said, and ends no run."""
        try:
            if (self.folder / "metrics.csv").exists():
                draw_curves(self.folder / "metrics.csv", self.folder / "curves.png")
            if (self.folder / "adapter").exists():
                write_card(self.folder / "adapter")
        except UserError as error:
            say(str(error))

    def _write(self, state: str) -> None:
        write_text(self.folder / "run.json", json.dumps({"state": state, **self.record}, indent=2) + "\n")


def _plan(trainer: Trainer, module: PEFTModule) -> str:
    """One line that says how many steps there are and of what size."""
    batch = getattr(getattr(trainer, "datamodule", None), "batch_size", None)
    steps = trainer.estimated_stepping_batches
    parts = ["optimizer steps without an end" if steps == float("inf") else f"{steps} optimizer steps"]
    if batch:
        size = batch * trainer.accumulate_grad_batches * trainer.world_size
        parts.append(f"{size} rows each ({batch} x {trainer.accumulate_grad_batches} accumulated x "
                     f"{trainer.world_size} processes)")  # fmt: skip
    return f"{', '.join(parts)}; precision {trainer.precision}"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _plain(value: Any) -> dict[str, Any]:
    return {key: item for key, item in vars(value).items() if not key.startswith("_")}
