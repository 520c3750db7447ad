"""Two configurations compared key by key, and which differences the user allowed."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peftlight.config_errors.given import Given, find
from peftlight.errors import UserError, nearest, one_line

FREE = (
    "ckpt_path", "weights_only", "data.cache_dir", "data.num_workers", "data.predict_source", "data.test_source",
    "trainer.barebones", "trainer.default_root_dir", "trainer.detect_anomaly", "trainer.enable_autolog_hparams",
    "trainer.enable_checkpointing", "trainer.enable_model_summary", "trainer.enable_progress_bar",
    "trainer.inference_mode", "trainer.limit_predict_batches", "trainer.limit_test_batches",
    "trainer.log_every_n_steps", "trainer.logger", "trainer.max_time", "trainer.model_registry",
    "trainer.num_sanity_val_steps", "trainer.profiler",
)  # fmt: skip
"""Keys, and sections, that change no number of a training."""
ONLY_WATCH = (
    "Checkpoint", "Checkpoints", "DeviceStatsMonitor", "Guard", "LearningRateMonitor", "ModelCheckpoint",
    "ModelSummary", "OnExceptionCheckpoint", "PredictionWriter", "Progress", "RichModelSummary", "RichProgressBar",
    "ShowPredictions", "TQDMProgressBar", "Timer",
)  # fmt: skip
"""Callbacks that change no number either."""
FACTS = {
    "base": "the weights of the base",
    "code": "the code of a class of yours",
    "data": "the content of the data",
    "processes": "the number of processes",
    "trainer.precision": "the precision that was chosen by itself",
}
"""What is no key, or is known only once everything is loaded, and can be allowed to change too."""
SEED = "seed_everything"
OF_PROCESSES = ("trainer.devices", "trainer.num_nodes", "trainer.strategy")
_OTHER_PROCESSES = (
    "  Another number of processes goes on with other random numbers (dropout), and with the same rows in each step\n"
    "  only if data.batch_size or trainer.accumulate_grad_batches make up for it."
)
_NO_OPTIONS = (".class_path", ".dict_kwargs")
"""Keys that do not stand in every configuration, so that one which came is a change."""
_LONGEST = 100
_ABSENT = object()
_SECTIONS = ("init_args", "trainer")
"""Keys whose value holds options, beside those of a class."""


@dataclass(frozen=True)
class Change:
    """A key whose value is not the recorded one."""

    key: str
    """With dots, without init_args; that of the section where another class is chosen."""
    was: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key} {shown(self.was)} -> {shown(self.now)}"


def differences(recorded: Mapping[str, Any], here: Mapping[str, Any]) -> list[Change]:
    """What in `here`, a resolved configuration, changes the numbers of a training that ran as `recorded`.

    What the recorded one does not have is an option that came later, and changes nothing by its default.
    """
    was, now = _flat(recorded), _flat(here)
    changed = [Change(key, was[key], now.get(key)) for key in was if was[key] != now.get(key, _ABSENT)]
    changed += [Change(key, None, now[key]) for key in now if key not in was and key.endswith(_NO_OPTIONS)]
    classes = [change.key.removesuffix(".class_path") for change in changed if change.key.endswith(".class_path")]
    return [
        Change(change.key.removesuffix(".class_path"), change.was, change.now)
        for change in changed
        if not _under(change.key, FREE)
        and not any(_under(change.key, (name,)) and change.key != f"{name}.class_path" for name in classes)
    ]


def shown(value: Any) -> str:
    """A value in one line, of a class its name."""
    text = one_line(str(value if value is not None else "null"))
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _flat(config: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """The options by their keys; a dict that is the value of one, such as a rank for each module, is one value."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        path = above if key == "init_args" else f"{above}{key}."
        if path == "trainer.callbacks.":
            found.update(_flat(dict(_working(value)), path))
        elif isinstance(value, Mapping) and (key in _SECTIONS or "class_path" in value):
            found.update(_flat(value, path))
        else:
            found[path.rstrip(".")] = value
    return found


def _working(callbacks: Any) -> Iterator[tuple[str, Any]]:
    """The callbacks that can change numbers, by their names; from the second of a name on with its number."""
    count = Counter[str]()
    for one in callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else []:
        name = str(one["class_path"]).rpartition(".")[2]
        count[name] += 1
        if name not in ONLY_WATCH:
            yield name if count[name] == 1 else f"{name}-{count[name]}", one


def _under(key: str, names: Sequence[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def plain_name(name: str) -> str:
    """The key as it is told here, of one that is written as in a file."""
    return ".".join(part for part in name.split(".") if part not in ("init_args", "class_path"))


def allowed_among(
    changes: Sequence[Change], allowed: Sequence[str], known: Mapping[str, Any], given: Sequence[Given]
) -> list[Change]:
    """Those of the changes that the user allowed, by their names or those of their sections.

    Args:
        changes: what differs.
        allowed: the names.
        known: the resolved configuration, whose keys can be named.
        given: what the user gave. A name of a key in it may come again, when the same command goes on once more.

    Raises:
        UserError: a name is not known, or nothing of that name differs.
    """
    for name in map(plain_name, allowed):
        if name in FACTS or any(_under(change.key, (name,)) for change in changes) or _stands(name, given):
            continue
        keys = {section for key in _flat(known) for section in _sections(plain_name(key))} | set(FACTS)
        if name not in keys:
            same = sorted(key for key in keys if key.endswith(f".{name}"))
            meant = f" Did you mean {' or '.join(map(repr, same[:2]))}?" if same else nearest(name, keys, 2)
            raise UserError(f"--allow_changes {name}: there is no such key.{meant} Leave it out, and all that differs "
                            "is told by its name.")  # fmt: skip
        raise UserError(f"--allow_changes {name} is not needed: it is as it was in the run. Leave it out.")
    return [change for change in changes if allows(allowed, change)]


def allows(names: Sequence[str], change: Change) -> bool:
    """Whether one of the names is that of the change, or of its section; the seed never changes."""
    return _under(change.key, [plain_name(name) for name in names if name != SEED])


def _sections(key: str) -> Iterator[str]:
    parts = key.split(".")
    yield from (".".join(parts[:count]) for count in range(1, len(parts) + 1))


def refuse(
    changes: Sequence[Change],
    given: Sequence[Given],
    what: str,
    limits: Sequence[str] = (),
    was_over: bool = False,
) -> None:
    """End with all changes in one error, if there are any.

    Args:
        changes: those that were not allowed.
        given: what the user gave, so that each is told with its place.
        what: the run or the checkpoint.
        limits: keys that end the training with these changes too, before it does anything more.
        was_over: whether nothing was left to train without the changes.

    Raises:
        UserError: there are changes.
    """
    if not changes:
        return
    if seed := next((change for change in changes if change.key == SEED), None):
        raise UserError(f"{SEED} is {seed.was} in {what}, {seed.now} {_given_by(seed, given)}. Its random numbers go "
                        "on where they stand, so another seed is for another run: leave it out.")  # fmt: skip
    each = [f"  {one.key}: {shown(one.was)} in the run, {shown(one.now)} {_given_by(one, given)}" for one in changes]
    names = " ".join(dict.fromkeys([*(change.key for change in changes), *limits]))
    raised = f", with more to do: {' '.join(f'--{name} N' for name in limits)}" if limits else ""
    as_it_was = "" if was_over else "To go on as it was, leave them out. "
    others = [_OTHER_PROCESSES] if any(_under(change.key, OF_PROCESSES) for change in changes) else []
    raise UserError("\n".join([
        f"The configuration is not the one of {what}:", *each, *others,
        f"  To go on with these changes: --allow_changes {names}{raised}",
        f"  {as_it_was}For a run of its own, leave out --resume or --ckpt_path.",
    ]))  # fmt: skip


def _stands(name: str, given: Sequence[Given]) -> bool:
    """Whether the user gave the key, or one under it, on the command line."""
    return any(one.on_command_line and _under(".".join(one.path), (name,)) for one in given)


def _given_by(change: Change, given: Sequence[Given]) -> str:
    found = find(given, tuple(change.key.split(".")))
    if found is None:
        return "by default"
    return f"given by {found.where}" if found.on_command_line else f"in {found.where}"
