"""What is taken out of the command line, what differs between two configurations, and what was allowed."""

import copy
from pathlib import Path
from typing import Any

import pytest

from peftlight.config_errors.given import read_given
from peftlight.errors import UserError
from peftlight.resume.asked import Asked, take_out
from peftlight.resume.changes import allowed_among, differences, refuse

RUN: dict[str, Any] = {
    "seed_everything": 42,
    "trainer": {
        "max_epochs": 2,
        "logger": None,
        "callbacks": [
            {"class_path": "mine.Stops", "init_args": {"patience": 3}},
            {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"every_n_train_steps": 5}},
        ],
    },
    "model": {
        "class_path": "peftlight.tasks.CausalLM",
        "init_args": {
            "strategy": {
                "class_path": "peftlight.strategies.LoRA",
                "init_args": {"rank": 8, "alpha_pattern": {"q": 16}},
            }
        },
    },
    "data": {"class_path": "D", "init_args": {"batch_size": 4, "num_workers": 0, "columns": {}}},
    "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.001, "betas": [0.9, 0.999]}},
}


def changed(**values: Any) -> dict[str, Any]:
    """The configuration with other values, by the ways to them with __ between the keys."""
    config = copy.deepcopy(RUN)
    for way, value in values.items():
        *above, last = way.split("__")
        inner = config
        for key in above:
            inner = inner[key]
        inner[last] = value
    return config


@pytest.mark.parametrize(
    ("arguments", "asked", "rest"),
    [
        (["--resume", "--config", "a.yaml"], Asked(resume=""), ["--config", "a.yaml"]),
        (["--resume", "r", "-c", "a.yaml"], Asked(resume="r"), ["-c", "a.yaml"]),
        (["--resume=r", "--trainer.max_steps", "-1"], Asked(resume="r"), ["--trainer.max_steps", "-1"]),
        (["-c", "a.yaml", "--init-adapter", "u/n"], Asked(init_adapter="u/n"), ["-c", "a.yaml"]),
        (["--init_adapter=u/n"], Asked(init_adapter="u/n"), []),
        (["--resume", "r", "--allow-changes", "a", "b,c", "--allow_changes=[d, e]"],
         Asked("r", None, ("a", "b", "c", "d", "e")), []),
        (["--config=a=b.yaml"], Asked(), ["--config=a=b.yaml"]),
    ],
)  # fmt: skip
def test_what_is_asked_for_is_taken_out(arguments: list[str], asked: Asked, rest: list[str]) -> None:
    assert take_out(["fit", *arguments]) == (asked, ["fit", *rest])


def test_other_commands_have_no_such_options() -> None:
    assert take_out(["validate", "--resume"]) == (Asked(), ["validate", "--resume"])


@pytest.mark.parametrize(
    "arguments", [["--resume", "a", "--resume", "b"], ["--init_adapter"], ["--allow_changes"], ["--resume", "a", "b"]]
)
def test_what_is_given_wrongly_is_refused(arguments: list[str]) -> None:
    with pytest.raises(UserError):
        take_out(["fit", *arguments])


@pytest.mark.parametrize(
    ("here", "keys"),
    [
        (changed(), []),
        (changed(trainer__logger=True, data__init_args__num_workers=4), []),
        (changed(trainer__max_epochs=3, optimizer__init_args__lr=0.1), ["trainer.max_epochs", "optimizer.lr"]),
        (changed(model__init_args__strategy__init_args__rank=4), ["model.strategy.rank"]),
        (changed(model__init_args__strategy={"class_path": "mine.X", "init_args": {"rank": 1, "more": 2}}),
         ["model.strategy"]),
        (changed(optimizer={"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}), ["optimizer"]),
        (changed(trainer__callbacks=None), ["trainer.callbacks.Stops"]),
        (changed(trainer__callbacks=[*RUN["trainer"]["callbacks"], {"class_path": "mine.More", "init_args": {"a": 1}}]),
         ["trainer.callbacks.More"]),
        (changed(trainer__callbacks=[{"class_path": "mine.Stops", "init_args": {"patience": 4}}]),
         ["trainer.callbacks.Stops.patience"]),
        (changed(trainer__profiler="simple", trainer__new_option_of_a_later_version=1), []),
        (changed(data__init_args__columns={"text": "review"}), ["data.columns"]),
        (changed(data__init_args__columns={}), []),
        (changed(model__init_args__strategy__init_args__alpha_pattern={"q": 16, "v": 32}),
         ["model.strategy.alpha_pattern"]),
        (changed(optimizer__dict_kwargs={"fused": True}), ["optimizer.dict_kwargs"]),
        (changed(trainer__callbacks=[*RUN["trainer"]["callbacks"],
                                     {"class_path": "mine.Stops", "init_args": {"patience": 9}}]),
         ["trainer.callbacks.Stops-2"]),
        (changed(seed_everything=7), ["seed_everything"]),
    ],
)  # fmt: skip
def test_what_changes_numbers_is_found(here: dict[str, Any], keys: list[str]) -> None:
    assert [change.key for change in differences(RUN, here)] == keys


def test_a_dict_that_was_empty_is_told_as_one_value() -> None:
    (change,) = differences(RUN, changed(data__init_args__columns={"text": "review"}))
    assert str(change) == "data.columns {} -> {'text': 'review'}"


def test_of_two_callbacks_of_a_class_each_is_compared() -> None:
    twice = [{"class_path": "mine.Stops", "init_args": {"patience": patience}} for patience in (3, 5)]
    other = [twice[0], {"class_path": "mine.Stops", "init_args": {"patience": 6}}]
    reversed_too = differences(changed(trainer__callbacks=twice[::-1]), changed(trainer__callbacks=other[::-1]))
    assert [change.key for change in reversed_too] == ["trainer.callbacks.Stops.patience"]
    changes = differences(changed(trainer__callbacks=twice), changed(trainer__callbacks=other))
    assert [change.key for change in changes] == ["trainer.callbacks.Stops-2.patience"]


def test_all_are_told_in_one_error_with_both_values_and_their_places(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("trainer:\n  max_epochs: 3\n")
    given = read_given(["fit", f"--config={file}", "--optimizer.lr", "0.1"])
    here = changed(trainer__max_epochs=3, optimizer__init_args__lr=0.1, data__init_args__batch_size=8)
    with pytest.raises(UserError) as refused:
        refuse(differences(RUN, here), given, "runs/x at step 5")
    assert str(refused.value) == (
        "The configuration is not the one of runs/x at step 5:\n"
        f"  trainer.max_epochs: 2 in the run, 3 in {file}:2\n"
        "  data.batch_size: 4 in the run, 8 by default\n"
        "  optimizer.lr: 0.001 in the run, 0.1 given by --optimizer.lr\n"
        "  To go on with these changes: --allow_changes trainer.max_epochs data.batch_size optimizer.lr\n"
        "  To go on as it was, leave them out. For a run of its own, leave out --resume or --ckpt_path."
    )


@pytest.mark.parametrize(
    ("allowed", "keys"),
    [
        (["trainer.max_epochs"], ["trainer.max_epochs"]),
        (["optimizer.init_args.lr", "trainer"], ["trainer.max_epochs", "optimizer.lr"]),
        (["optimizer", "data"], ["optimizer.lr"]),
    ],
)
def test_what_is_allowed_by_its_name_or_its_section(allowed: list[str], keys: list[str]) -> None:
    here = changed(trainer__max_epochs=3, optimizer__init_args__lr=0.1)
    assert [one.key for one in allowed_among(differences(RUN, here), allowed, here, [])] == keys


def test_names_that_are_not_there_or_not_needed_are_refused() -> None:
    here = changed(trainer__max_epochs=3)
    changes = differences(RUN, here)
    with pytest.raises(UserError, match=r"no such key\. Did you mean 'trainer.max_epochs'"):
        allowed_among(changes, ["trainer.max_epoch"], here, [])
    with pytest.raises(UserError, match=r"optimizer\.lr is not needed"):
        allowed_among(changes, ["optimizer.lr"], here, [])
    again = read_given(["fit", "--optimizer.lr", "0.001"])  # the command by which the run was changed before
    assert allowed_among(changes, ["optimizer.lr", "trainer.max_epochs"], here, again) == changes


def test_the_seed_is_never_changed() -> None:
    here = changed(seed_everything=7)
    changes = differences(RUN, here)
    assert allowed_among(changes, ["seed_everything"], here, []) == []
    with pytest.raises(UserError, match="seed_everything is 42 in runs/x, 7 by default"):
        refuse(changes, [], "runs/x")
