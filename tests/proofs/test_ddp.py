"""`peftlight verify ddp` in real processes."""

from pathlib import Path

import pytest

from proofs.small import PROOF, SENTENCES, verify

pytestmark = [*PROOF, pytest.mark.usefixtures("alone_forked")]


def test_two_processes_train_what_one_does(encoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*SENTENCES, "--trainer.accumulate_grad_batches=2", "--trainer.precision=bf16-mixed"]
    assert verify("ddp", "adalora", encoder, *flags) == 0
    assert "equal: the gradients of the first step, 38 tensors of " in capsys.readouterr().out


def test_a_gradient_of_one_process_alone_is_found(encoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify("ddp", "OfOneProcess", encoder, *SENTENCES, "--steps=2") == 1
    said = capsys.readouterr().out
    assert "differs: the gradient of model." in said
    assert "on process 2 of 2" in said
