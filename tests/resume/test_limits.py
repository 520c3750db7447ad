"""To which limits a training has come, and what is said of it."""

import json
from pathlib import Path
from typing import Any

import pytest

from peftlight.errors import UserError
from peftlight.resume.limits import Done, done_in, reached
from peftlight.resume.past import Past, check_unfinished

LAST = {"global_step": 12, "loops": {"fit_loop": {"epoch_progress": {"current": {"started": 2, "processed": 2}}}}}


def config(**trainer: Any) -> dict[str, Any]:
    return {"trainer": {"max_steps": -1, "max_epochs": None, "max_time": None, "callbacks": None, **trainer}}


@pytest.mark.parametrize(
    ("checkpoint", "trainer", "names"),
    [
        ({}, {"max_steps": 12, "max_epochs": 2}, ["trainer.max_steps", "trainer.max_epochs"]),
        ({}, {"max_steps": 13, "max_epochs": 3}, []),
        ({}, {"max_epochs": -1}, []),
        ({"progress": {"in_epoch": True}}, {"max_epochs": 2}, []),
        ({"callbacks": {"Timer": {"time_elapsed": {"train": 9.5}}}}, {"max_time": "00:00:00:10"}, []),
        ({"callbacks": {"Timer": {"time_elapsed": {"train": 11.0}}}}, {"max_time": {"seconds": 10}},
         ["trainer.max_time"]),
        ({"callbacks": {"EarlyStopping{'monitor': 'val_loss'}": {"wait_count": 3, "patience": 3}}},
         {"callbacks": [{"class_path": "lightning.pytorch.callbacks.EarlyStopping"}]}, ["EarlyStopping"]),
        ({"callbacks": {"EarlyStopping{'monitor': 'val_loss'}": {"wait_count": 3, "patience": 3}}}, {}, []),
    ],
)  # fmt: skip
def test_the_limits_behind_which_nothing_is_left(
    checkpoint: dict[str, Any], trainer: dict[str, Any], names: list[str]
) -> None:
    assert reached(done_in({**LAST, **checkpoint}), config(**trainer)) == names


def test_a_time_that_is_used_up_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"state": "stopped by max_time", "steps": 12}))
    past = Past(tmp_path / "last.ckpt", tmp_path, 12, {}, Done(12, 1, {"time_elapsed": {"train": 11.0}}))
    with pytest.raises(UserError, match=r"max_time 00:00:00:10, which counts over all its resumes. To train on: "
                                        r"--trainer.max_time LONGER\. To begin"):  # fmt: skip
        check_unfinished(past, [], config(max_time="00:00:00:10"))
    check_unfinished(past, [], config(max_time="00:00:01:00"))
