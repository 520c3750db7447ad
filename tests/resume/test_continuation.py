"""What was allowed to change is not written over by the checkpoint."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping
from torch.optim import AdamW

from models import make
from peftlight.resume.changes import Change
from peftlight.resume.continuation import Continuation
from peftlight.resume.past import Past
from peftlight.strategies import LoRA
from peftlight.tasks import SequenceClassification
from tasks.small import QUIET, Rows, batches, class_rows, constant, quiet_trainer

pytestmark = QUIET


def fitted(folder: Path, callbacks: list[Callback], resumed: Path | None = None, **options: Any) -> Trainer:
    """Two epochs, or as many as there is patience for, by an optimizer with these options."""
    module = SequenceClassification(
        make("bert"), LoRA(rank=2), trained_modules=["classifier"], lr_scheduler=constant,
        optimizer=lambda parameters: AdamW(parameters, **options),
    )  # fmt: skip
    trainer = quiet_trainer(folder, callbacks, max_epochs=4)
    trainer.fit(module, datamodule=Rows(batches(class_rows([5, 9], [0, 1]), 1)), ckpt_path=resumed, weights_only=True)
    return trainer


def impatient(patience: int) -> EarlyStopping:
    return EarlyStopping("val_loss", min_delta=100.0, patience=patience)


def test_options_that_no_signature_has_and_the_patience_of_early_stopping(tmp_path: Path) -> None:
    half = tmp_path / "half.ckpt"
    first = fitted(tmp_path, [impatient(1)], weight_decay=0.1)
    assert first.current_epoch == 2
    first.save_checkpoint(half)
    was, now = {"weight_decay": 0.1, "eps": 1e-6}, {"weight_decay": 0.3}
    changes = [Change("optimizer.dict_kwargs", was, now), Change("trainer.callbacks.EarlyStopping.patience", 1, 9)]
    continuation = Continuation(Past(half, None, 4), changes, [change.key for change in changes], "{}")
    second = fitted(tmp_path, [continuation, impatient(9)], half, **now)
    (group,) = second.optimizers[0].param_groups
    assert (group["weight_decay"], group["eps"]) == (0.3, 1e-8)
    assert second.current_epoch == 4
