"""`peftlight verify resume` with processes that are killed."""

from pathlib import Path

import pytest

from proofs.small import PROOF, SENTENCES, verify

pytestmark = [*PROOF, pytest.mark.usefixtures("forked")]


def test_a_training_killed_within_an_accumulation_window_is_the_straight_one(
    encoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify("resume", "adalora", encoder, *SENTENCES, "--trainer.accumulate_grad_batches=2") == 0
    said = capsys.readouterr().out
    assert "killed after 5 of 8 batches of epoch 1" in said
    assert "killed at the start of epoch 2" in said
    assert "equal: " in said


def test_state_that_no_checkpoint_holds_is_found(encoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify("resume", "Counting", encoder, *SENTENCES) == 1
    said = capsys.readouterr().out
    assert "differs: " in said
    assert "\n  state_dict.model." in said


def test_too_few_steps_are_refused(encoder: Path) -> None:
    from peftlight.errors import UserError

    with pytest.raises(UserError, match="--steps is 2: resuming is proven within an epoch and after one"):
        verify("resume", "lora", encoder, *SENTENCES, "--steps=2")
