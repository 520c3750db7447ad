"""The run folder of a fit that is started without the command line."""

import builtins
import json
import logging
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger

import peftlight
from models import make
from peftlight import load_adapter
from peftlight.callbacks import RunRecord
from peftlight.console import say
from peftlight.interop import read_record
from peftlight.resume.past import Past
from peftlight.strategies import LoRA
from peftlight.tasks import SequenceClassification
from tasks.small import QUIET, Rows, batches, class_rows, constant, loader, padded, quiet_trainer

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists and is not empty")]

ROWS = class_rows([5, 9, 4, 12], [0, 1, 2, 1])
NAMES = ["cold", "mild", "hot"]
CONFIG = "model: SequenceClassification\n"


def module() -> SequenceClassification:
    return SequenceClassification(make("bert"), LoRA(rank=2), lr_scheduler=constant)


def recorded(folder: Path, *more: Callback, **options: Any) -> Trainer:
    logger = CSVLogger(folder.parent, name="", version=folder.name)
    record = RunRecord(folder, CONFIG, ["fit", "--config", "a.yaml"], seed=7)
    return quiet_trainer(folder.parent, [record, *more], logger=logger, **options)


def run_json(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


class Failing(Callback):
    """Fails in the second step."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            raise self.error


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "one [1]"


def test_a_fit_is_recorded(folder: Path) -> None:
    tuned = module()
    recorded(folder, max_epochs=3).fit(tuned, Rows(batches(ROWS, 2), label_names=NAMES))
    names = {"config.yaml", "run.json", "log.txt", "metrics.csv", "curves.png", "adapter"}
    assert names <= {path.name for path in folder.iterdir()}
    assert (folder / "config.yaml").read_text() == CONFIG
    found = run_json(folder)
    assert found["state"] == "finished"
    assert (found["seed"], found["command"]) == (7, ["fit", "--config", "a.yaml"])
    assert (found["processes"], found["precision"]) == (1, "32-true")
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["peftlight"] == peftlight.__version__
    assert (found["data_fingerprint"], found["data"]) == (None, {})
    assert [row["modules"] for row in found["trained"]][-1] == "classifier"
    assert {"train_loss", "val_loss", "val_accuracy", "val_f1"} <= set(found["metrics"])
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_adapter_of_the_run_folder_gives_the_same_outputs(folder: Path) -> None:
    tuned, fresh = module(), make("bert")
    recorded(folder).fit(tuned, loader(batches(ROWS, 2)))
    load_adapter(fresh, folder / "adapter")
    batch = padded(ROWS)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    assert tuned.model is not None
    with torch.no_grad():
        assert torch.equal(fresh.eval()(**inputs).logits, tuned.model.eval()(**inputs).logits)
        assert not torch.equal(make("bert")(**inputs).logits, fresh(**inputs).logits)


def test_the_log_holds_the_table_the_plan_and_what_lightning_says_once_each(folder: Path) -> None:
    recorded(folder, max_epochs=2, accumulate_grad_batches=2).fit(module(), Rows(batches(ROWS, 2)))
    log = (folder / "log.txt").read_text()
    assert "bert.encoder.layer.*.attention.self.query" in log
    assert "2 optimizer steps, 4 rows each (2 x 2 accumulated x 1 processes); precision 32-true" in log
    assert log.count("`Trainer.fit` stopped: `max_epochs=2` reached.") == 1
    assert f"finished; run folder: {folder}" in log  # in one line, brackets and all


def test_after_the_run_nothing_listens_any_more(folder: Path) -> None:
    before = {name: list(logging.getLogger(name).handlers) for name in ("peftlight", "lightning", "lightning.pytorch")}
    recorded(folder).fit(module(), loader(batches(ROWS, 2)))
    assert {name: list(logging.getLogger(name).handlers) for name in before} == before
    size = (folder / "log.txt").stat().st_size
    say("more")
    assert (folder / "log.txt").stat().st_size == size


def test_a_failure_is_recorded_with_its_error_and_traceback(folder: Path) -> None:
    with pytest.raises(RuntimeError, match="out of luck"):
        recorded(folder, Failing(RuntimeError("out of luck"))).fit(module(), loader(batches(ROWS, 2)))
    found = run_json(folder)
    assert (found["state"], found["error"]) == ("failed", "RuntimeError: out of luck")
    log = (folder / "log.txt").read_text()
    assert "Traceback" in log
    assert "on_train_batch_start" in log
    assert not (folder / "adapter").exists()


def test_a_full_disk_hides_no_other_failure(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Full(Callback):
        def on_train_batch_start(self, *rest: Any) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))

    callbacks = [RunRecord(folder, CONFIG, ["fit"], seed=7), Full(), Failing(RuntimeError("out of luck"))]
    try:
        with pytest.raises(RuntimeError, match="out of luck"):
            quiet_trainer(folder.parent, callbacks).fit(module(), loader(batches(ROWS, 2)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capsys.readouterr()
    assert "No room left to write" in said.out
    assert "Logging error" not in said.err
    assert run_json(folder)["state"] == "running"


def test_a_record_that_is_no_json_is_begun_anew(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "run.json").touch()
    past = Past(folder / "checkpoints" / "last.ckpt", folder, step=0)
    record = RunRecord(folder, CONFIG, ["fit"], seed=7, past=past)
    quiet_trainer(folder.parent, [record]).fit(module(), loader(batches(ROWS, 2)))
    assert run_json(folder)["state"] == "finished"


def test_an_interruption_is_recorded_as_one(folder: Path) -> None:
    with pytest.raises(SystemExit):
        recorded(folder, Failing(KeyboardInterrupt())).fit(module(), loader(batches(ROWS, 2)))
    assert run_json(folder)["state"] == "interrupted"


def test_a_run_that_goes_on_says_so(folder: Path) -> None:
    states = []

    class Look(Callback):
        def on_train_batch_start(self, *rest: Any) -> None:
            states.append(run_json(folder)["state"])

    recorded(folder, Look()).fit(module(), loader(batches(ROWS, 4)))
    assert states == ["running"]


def test_a_run_without_an_end_is_recorded_too(folder: Path) -> None:
    class Stop(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
            trainer.should_stop = True

    recorded(folder, Stop(), max_epochs=-1).fit(module(), loader(batches(ROWS, 4)))
    assert run_json(folder)["state"] == "finished"


def test_a_test_run_keeps_its_metrics_and_writes_no_adapter(folder: Path) -> None:
    recorded(folder).test(module(), loader(batches(ROWS, 2)), verbose=False)
    found = run_json(folder)
    assert found["state"] == "finished"
    assert 0 <= found["metrics"]["test_accuracy"] <= 1
    assert not (folder / "adapter").exists()


def test_without_matplotlib_the_line_that_installs_it_is_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def without_matplotlib(name: str, *rest: Any, **named: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    recorded(folder).fit(module(), loader(batches(ROWS, 2)))
    assert not (folder / "curves.png").exists()
    assert run_json(folder)["state"] == "finished"
    for said in (capsys.readouterr().out, (folder / "log.txt").read_text()):
        assert 'pip install "peftlight[plots]"' in said


def test_the_adapter_knows_its_run(folder: Path) -> None:
    """Its folder may go elsewhere, without the run's."""
    recorded(folder, max_epochs=2).fit(module(), Rows(batches(ROWS, 2), label_names=NAMES))
    found = read_record(folder / "adapter")
    assert (found.task, found.label_names) == ("SequenceClassification", NAMES)
    assert (found.base.auto_class, found.base.dtype) == ("AutoModelForSequenceClassification", "float32")
    assert (found.steps, found.seed) == (4, 7)
    assert found.metrics is not None
    assert found.metrics["val_accuracy"] == run_json(folder)["metrics"]["val_accuracy"]
    assert found.data is not None
    assert found.data["fingerprint"] is None


def test_a_failure_is_in_the_record_before_metrics_are_waited_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[dict[str, Any]] = []

    def read(*_: object) -> dict[str, float | None]:
        found.append(run_json(folder))
        return {}

    monkeypatch.setattr(RunRecord, "_values", read)
    with pytest.raises(ValueError, match="broken"):
        recorded(folder, Failing(ValueError("broken"))).fit(module(), Rows(batches(ROWS, 2)))
    assert (found[-1]["state"], found[-1]["error"]) == ("failed", "ValueError: broken")
