"""The run folder: what was asked for, what happened, and what was trained."""

import json
import logging
import math
import platform
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from peftlight.callbacks.adapter_record import adapter_record
from peftlight.callbacks.curves import draw_curves
from peftlight.callbacks.found_values import with_found
from peftlight.callbacks.metrics_file import NAME as METRICS
from peftlight.callbacks.metrics_file import go_on, lines_of
from peftlight.callbacks.stopping import time_was_up
from peftlight.class_paths import definitions
from peftlight.console import say, stop_log, write_log_to
from peftlight.errors import UserError
from peftlight.files import clear_unfinished, write_text
from peftlight.handover.model_card import write_card
from peftlight.interop import save_adapter
from peftlight.quantization import held
from peftlight.report import rows_of, table_of, without_delta
from peftlight.resume.past import Past, read_run
from peftlight.resume.recorded import KEY, Recorded, facts_of, versions
from peftlight.shards import is_sharded
from peftlight.signals import Stopped, StoppedTogether
from peftlight.strategy_spec import kinds_in
from peftlight.tasks import PEFTModule, TaskCallback
from peftlight.tasks.planned_steps import accumulations, planned_steps
from peftlight.watching import Watch

Metrics = dict[str, float | None]

UNVERIFIED = "adapter-unverified"
"""The folder of what was trained where the audit fails."""


class RunRecord(TaskCallback):
    """Keeps config.yaml, run.json, log.txt, metrics.csv, curves.png and adapter/ in the run's own folder."""

    def __init__(
        self,
        folder: Path,
        config: str,
        command: list[str],
        seed: int | None,
        past: Past | None = None,
        allowed: Sequence[str] = (),
        remarks: Sequence[str] = (),
    ) -> None:
        """
        Args:
            folder: the run folder; metrics.csv is written there by the logger.
            config: the resolved configuration as YAML.
            command: the command line that started the run.
            seed: the seed of all random numbers.
            past: what is gone on with, in this folder or from elsewhere.
            allowed: names of what may differ from it.
            remarks: what is said of the configuration at the start.
        """
        self.folder, self.config, self.past, self.allowed = folder, config, past, list(allowed)
        self._remarks = list(remarks)
        self.began = False
        """Whether a step of training, or of what else was asked for, was begun."""
        self.was_trial = False
        """Whether it ended well as a trial of a few batches (fast_dev_run), of which nothing is kept."""
        self._facts: Recorded = {}
        self._owned: list[str] = []
        self.record: dict[str, Any] = {"command": command, "seed": seed, "python": platform.python_version()}
        before: Recorded = past.facts if past is not None and past.folder == folder else {}
        self._before: Metrics = {**before.get("values", {})}
        self._seen = self._before
        self._started = time.time() - before.get("seconds", 0.0)
        self._trained_before, self._training_since = before.get("training_seconds", 0.0), time.monotonic()
        self._log: logging.Handler | None = None
        self._outdated: set[str] = set()
        self._handed_on = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.world_size > 1:  # those that the first process did not start itself do not know the folder yet
            self.folder = Path(trainer.strategy.broadcast(str(self.folder)))
            # Private, but nothing else sets it this late.
            trainer._default_root_dir = str(self.folder)  # type: ignore[attr-defined]
        if not trainer.is_global_zero or self._log is not None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._log = write_log_to(self.folder / "log.txt")
        for remark in self._remarks:
            say(remark)
        if self.past is not None:
            self._continue(self.past)
        if not self._untouched:
            write_text(self.folder / "config.yaml", self.config)
        datamodule = getattr(trainer, "datamodule", None)
        self.record |= {
            "versions": versions(),
            "started": self.record.get("started") or _now(),
            "processes": trainer.world_size,
            "precision": trainer.precision,
            "data_fingerprint": getattr(datamodule, "fingerprint", None),
            "data": {split: _plain(s) for split, s in (getattr(datamodule, "summaries", None) or {}).items()},
        }
        if isinstance(pl_module, PEFTModule) and pl_module.initial is not None:
            self.record["initialised_from"] = pl_module.initial.facts()
        self._write("running")
        for watch in (callback for callback in trainer.callbacks if isinstance(callback, Watch)):  # type: ignore[attr-defined]
            watch.at_end = partial(self.on_exception, trainer, pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(pl_module, PEFTModule):
            return
        assert pl_module.adapter is not None
        self.config = with_found(self.config, trainer, pl_module)
        self._note_facts(trainer, pl_module)  # in every process: sharded tensors are read together
        if trainer.is_global_zero:
            if pl_module.quantization is not None:
                assert pl_module.model is not None
                say(f"the base in {pl_module.quantization}: {held(pl_module.model)}")
            say(table_of(pl_module.adapter))
            say(_plan(trainer, pl_module))
            steps = planned_steps(trainer)
            self.record["steps_planned"] = None if steps == float("inf") else steps
            self.record["trained"] = [_plain(row) for row in rows_of(pl_module.adapter)]
            self.record["without_delta"] = [_plain(each) for each in without_delta(pl_module.adapter)]
            if own := definitions([type(pl_module), *kinds_in(pl_module.strategy)]):
                self.record["defined_in"] = own
            self._write("running")

    def _note_facts(self, trainer: Trainer, module: PEFTModule) -> None:
        assert module.adapter is not None
        self._owned, self._facts = list(module.adapter.trained), facts_of(trainer, module, self.config)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._training_since = time.monotonic()
        self._begin(trainer)
        if self.past is not None and "metrics" in self.past.facts:
            go_on(trainer, self.past.facts["metrics"])

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.began = self.began or not trainer.sanity_checking

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.began = True

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.began = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        seconds = self._trained_before + time.monotonic() - self._training_since
        self.record["training_seconds"] = round(seconds, 2)  # up to the last batch

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """A checkpoint says by which configuration it came about, and how far the run's files were."""
        if not isinstance(pl_module, PEFTModule):
            return
        assert pl_module.adapter is not None
        if self._facts and pl_module.adapter.trained != self._owned:  # a callback has unfrozen a part of the base
            self._note_facts(trainer, pl_module)
        # In every process: sharded tensors and the metrics of an epoch are read together.
        lines, values = lines_of(trainer, pl_module), self._values(trainer)
        if not trainer.is_global_zero:
            return
        checkpoint[KEY] = {
            **self._facts,
            "seconds": time.time() - self._started,
            "training_seconds": self.record.get("training_seconds", self._trained_before),
            "metrics": lines,
            "values": values,
        }

    def after_training(self, trainer: Trainer, module: PEFTModule) -> None:
        """Save what stands; what the audit does not vouch for is saved aside.

        Raises:
            UserError: the audit fails.
        """
        self._handed_on = True
        try:
            verdict = module.audit()
        except UserError as error:
            self._save(trainer, module, self._seen, UNVERIFIED)  # no waiting: it may have failed in this process alone
            raise UserError(f"{error} {_aside(self.folder / UNVERIFIED)}") from None
        if self.past is None or trainer.global_step > self.past.step:  # without a step nothing could move
            if trainer.is_global_zero:
                say(str(verdict))
            self.record["audit"] = {**_plain(verdict), "trained": [_plain(tensor) for tensor in verdict.trained],
                                    "unmet": module.unmet}  # fmt: skip
        self._outdated = module.ending.outdated_metrics()
        self._save(trainer, module, self._values(trainer))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A training that was over and ended before its adapter was saved has no step to do when it is resumed."""
        if isinstance(pl_module, PEFTModule) and not self._handed_on and (self.began or self.past is not None):
            self._begin(trainer)
            self.after_training(trainer, pl_module)

    def _begin(self, trainer: Trainer) -> None:
        self.began = True
        if trainer.is_global_zero:
            write_text(self.folder / "config.yaml", self.config)
            self._write("running")

    @property
    def _untouched(self) -> bool:
        """Whether a run is to go on here that has not yet: should it be refused, it stays as it was."""
        return not self.began and self.past is not None and self.past.folder == self.folder

    def _save(self, trainer: Trainer, module: PEFTModule, values: Metrics, name: str = "adapter") -> None:
        assert module.adapter is not None
        if not getattr(trainer, "fast_dev_run", 0) and (trainer.is_global_zero or is_sharded(module.adapter.model)):
            record = adapter_record(trainer, module, self.record, values)
            save_adapter(module.adapter, self.folder / name, record)

    def _values(self, trainer: Trainer) -> Metrics:
        """All metrics as last logged, before a resume too; None where one was not a finite number.

        Once the adapter is saved, those of a validation of something else are left out.

        Those of an epoch may still have to be reduced over the processes: all of them have to call this.
        """
        values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        seen = {**self._before, **finite}
        self._seen = {name: value for name, value in seen.items() if name not in self._outdated}
        return self._seen

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        values = self._values(trainer)
        if trainer.is_global_zero and self._log is not None:
            self.was_trial = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]  # Lightning sets it from outside
            ended = "a trial went through" if self.was_trial else "finished"
            self._finish(trainer, "stopped by max_time" if time_was_up(trainer) else ended, values)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        together = trainer.world_size == 1 or isinstance(exception, StoppedTogether)
        if not trainer.is_global_zero and together:
            self._values(trainer)
        if not trainer.is_global_zero or self._log is None:
            return
        interrupted = isinstance(exception, KeyboardInterrupt | Stopped)
        state = "interrupted" if interrupted else "failed"
        if not interrupted:
            self.record["error"] = f"{type(exception).__name__}: {exception}"
            cause = (type(exception), exception, exception.__traceback__)
            self._log.handle(logging.LogRecord("peftlight", logging.ERROR, "", 0, "the run failed", None, cause))
        try:
            self._write(state)  # first: what comes next may wait for a device that does not answer
            self._finish(trainer, state, self._values(trainer) if together else self._seen)
        except (UserError, OSError) as error:  # a disk on which nothing can be written hides no other failure
            say(str(error))

    def _continue(self, past: Past) -> None:
        """Say in the record where the run goes on; what was recorded before in this folder stays."""
        resumed: dict[str, Any] = {"step": past.step, "from": str(past.checkpoint), "time": _now(),
                                   "command": self.record["command"]}  # fmt: skip
        former = past.facts.get("config")
        if former is not None and former != self.config:
            resumed["config_before"] = former
        if self.allowed:
            resumed["allowed"] = self.allowed
        if past.folder == self.folder:
            clear_unfinished(self.folder)
            before = read_run(self.folder)
            for outdated in ("error", "state"):
                before.pop(outdated, None)
            self.record |= before
        self.record["resumed"] = [*self.record.get("resumed", []), resumed]
        for remark in past.passed_over:
            say(remark)
        say(f"resumed at step {past.step} from {past.checkpoint}")

    def note(self, **facts: Any) -> None:
        """Write further facts into run.json while the training runs."""
        self.record |= facts
        self._write("running")

    def _finish(self, trainer: Trainer, state: str, values: Metrics) -> None:
        assert self._log is not None
        for logger in trainer.loggers:
            logger.save()
        self.record |= {"seconds": round(time.time() - self._started, 1), "metrics": values}
        self.record["steps"] = trainer.global_step
        self._write("running" if state == "finished" else state)  # it is finished once all its files are there
        if trainer.state.fn == "fit" and not self._untouched:
            self._describe()
        self._write(state)
        if self.was_trial:
            say(f"a trial of at most {trainer.fast_dev_run} batches of each kind (fast_dev_run) went through: "  # type: ignore[attr-defined]
                "no adapter and no checkpoint was saved")  # fmt: skip
        elif self.began:
            say(f"{state}; run folder: {self.folder}")
        stop_log(self._log)
        self._log = None

    def _describe(self) -> None:
        """The picture and the card; what keeps them from being made is said, and ends no run."""
        try:
            if (self.folder / METRICS).exists():
                draw_curves(self.folder / METRICS, self.folder / "curves.png")
            if (self.folder / "adapter").exists():
                write_card(self.folder / "adapter")
        except UserError as error:
            say(str(error))

    def _write(self, state: str) -> None:
        if self._untouched:
            return
        write_text(self.folder / "run.json", json.dumps({"state": state, **self.record}, indent=2) + "\n")


def _plan(trainer: Trainer, module: PEFTModule) -> str:
    """One line that says how many steps there are and of what size."""
    batch = getattr(getattr(trainer, "datamodule", None), "batch_size", None)
    steps = planned_steps(trainer)
    known = steps is not None and steps != float("inf")
    parts = [f"{steps} optimizer steps" if known else
             f"optimizer steps {'until the data end' if steps is None else 'without an end'}"]  # fmt: skip
    if batch:
        factors = accumulations(trainer)
        sizes = ", then ".join(str(batch * factor * trainer.world_size) for factor in factors)
        machines = f" on {trainer.num_nodes} machines" if trainer.num_nodes > 1 else ""
        parts.append(f"{sizes} rows each ({batch} x {', then '.join(map(str, factors))} accumulated x "
                     f"{trainer.world_size} processes{machines})")  # fmt: skip
    return f"{', '.join(parts)}; precision {trainer.precision}"


def _aside(folder: Path) -> str:
    return (
        f"What was trained is not lost: it is in {folder}, and not in adapter/. On a base as it was it loads with "
        "load_adapter(base, folder, other_base=True); evaluate it before you use it."
    )


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _plain(value: Any) -> dict[str, Any]:
    return {key: item for key, item in vars(value).items() if not key.startswith("_")}
