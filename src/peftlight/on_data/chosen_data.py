"""The data that adapters work on: that of their run, or what is given instead; with the classes that they know."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

from peftlight.data import DataFamily, TextData
from peftlight.errors import UserError, listed
from peftlight.on_data.run_config import RunConfig
from peftlight.opened import Opened
from peftlight.tasks import PEFTModule
from peftlight.tasks.kinds import refuse_other_data

FAMILIES = {
    "CausalLM": "PlainText",
    "ImageClassification": "Images",
    "Seq2Seq": "SourceTarget",
    "SequenceClassification": "TextClassification",
    "TokenClassification": "TaggedWords",
}
"""The data of a task where nothing else is known."""


@dataclass(frozen=True)
class Choice:
    """Which data is asked for."""

    role: Literal["validation", "test", "predict"]
    """What its rows are for."""
    kind: str | None = None
    """A class of data; None: that of the configuration, or that of the task."""
    source: str | None = None
    """Where the rows are; None: where the configuration says."""
    batch_size: int | None = None
    """Rows per batch; None: as the configuration says."""
    columns: dict[str, str] | None = None
    """Names of the rows' columns by ours; None: as the configuration says."""


def chosen_data(opened: Opened, task: type[PEFTModule], config: RunConfig, choice: Choice) -> LightningDataModule:
    """The data of the configuration, changed as it is chosen.

    Raises:
        UserError: nothing says what the data is, or it is a class of the user's that cannot be changed so.
    """
    kind = choice.kind or (None if config.data else _family_of(task))
    if kind is not None:
        if choice.source is None:
            raise UserError("It is not known on which data: the adapter is not in the folder of its run. Give --config "
                            "and a YAML with a section `data`; or --source and a file, folder or hub id, with --data "
                            f"and a class if the rows are not those of {kind}.")  # fmt: skip
        section = {"class_path": kind, "init_args": {"source": choice.source}}
        config = RunConfig(data=section)
    data = config.make_data()
    refuse_other_data(task, data)
    chosen = {"batch_size": choice.batch_size, "columns": choice.columns}
    changes: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
    if not isinstance(data, DataFamily):
        if changes or choice.source is not None:
            raise UserError(f"{type(data).__name__} is a class of your own: which rows it gives, and how many in a "
                            "batch, is set by its options in the section `data` of --config.")  # fmt: skip
        return data
    if choice.source is not None:
        changes |= _elsewhere(data, choice, _known_classes(opened, choice, of_run=kind is None))
    return _with_padding(dataclasses.replace(data, **changes), opened)


def _family_of(task: type[PEFTModule]) -> str:
    return next(FAMILIES[parent.__name__] for parent in task.__mro__ if parent.__name__ in FAMILIES)


def _known_classes(opened: Opened, choice: Choice, of_run: bool) -> list[str] | None:
    """The classes that the data has because the adapter does; None: those that are found in the rows."""
    first = opened.adapters.names[0]
    if of_run:
        return opened.records[first].label_names
    return classes_of(opened, first) if choice.role == "predict" else None


def _elsewhere(data: DataFamily, choice: Choice, classes: list[str] | None) -> dict[str, Any]:
    """Fields that let the rows come from elsewhere; where the classes are known, the data's own rows are not needed."""
    fields: dict[str, Any] = {f"{role}_source": None for role in ("validation", "test", "predict")}
    fields[f"{choice.role}_source"] = choice.source
    if hasattr(data, "labels"):
        fields["labels"] = data.labels or classes
    return fields | ({"source": choice.source, "subset": None} if fields.get("labels", True) else {})


def _with_padding(data: DataFamily, opened: Opened) -> DataFamily:
    """Any token will do, for what is padding follows from positions."""
    if not isinstance(data, TextData) or data.pad_token is not None or data.tokenizer is not None:
        return data
    tokenizer = opened.tokenizer
    return data if tokenizer.pad_token is not None else dataclasses.replace(data, pad_token=tokenizer.eos_token)


class SameClasses(Callback):
    """Refuses adapters that tell other classes apart than the data has, once the data is read."""

    def __init__(self, opened: Opened) -> None:
        self.opened = opened

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        names, where = getattr(data, "label_names", None), getattr(data, "source", type(data).__name__)
        for name in self.opened.adapters.names if names else ():
            own = classes_of(self.opened, name)
            if not _same(own, names or ()):
                raise UserError(
                    f"The adapter {name!r} tells {len(own)} classes apart ({listed(own)}), but {where} has "
                    f"{len(names or ())} ({listed(names or ())}). Leave the adapter out, or give data with its "
                    "classes; what they are called, in order, is `labels` in the data's section of --config."
                )


def classes_of(opened: Opened, name: str) -> list[str]:
    """The names of an adapter's classes; their numbers where it has no names."""
    if names := opened.records[name].label_names:
        return names
    adapter = opened.adapters[name]
    state = adapter.state()
    brought = [len(state[key]) for key, held in adapter.originals.items() if held.shape != state[key].shape]
    config: Any = opened.model.config
    of_base = next((other.labels["id2label"] for other in opened.adapters if other.enabled and other.labels), None)
    count = brought[0] if brought else len(of_base or config.id2label)
    return [str(number) for number in range(count)]


def _same(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether both name the same classes in the same order; a class without a name is called by its number."""
    if len(one) < len(other):
        return False
    pairs = enumerate(zip(one, [*other, *one[len(other) :]], strict=True))
    unnamed = all(name == str(place) for place, name in enumerate(one) if place >= len(other))
    return unnamed and all(a == b or str(place) in (a, b) for place, (a, b) in pairs)
