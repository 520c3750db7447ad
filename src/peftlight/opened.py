"""Adapters from their folders on the base that they were trained on."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftlight.adapters import Adapters
from peftlight.errors import UserError, listed
from peftlight.handover.hub import adapter_folder
from peftlight.interop import Record, read_record
from peftlight.opening import Opening
from peftlight.pretrained import Source
from peftlight.quantization import Quantization


@dataclass
class Opened:
    """A base with adapters on it, all of them off."""

    source: Source
    auto_class: str
    """The class of transformers that made the base."""
    model: nn.Module
    """The base, in eval mode."""
    adapters: Adapters
    records: dict[str, Record]
    """Where each adapter comes from, by its name."""
    new: list[str] = field(default_factory=list)
    """Parameters of the base that no file of it held, its head for instance: they are random."""
    options: dict[str, Any] = field(default_factory=dict)
    """Those with which the base was loaded."""

    def base_again(self) -> nn.Module:
        """The base loaded once more, without adapters; in eval mode, what is random drawn anew."""
        return self.source.load_model(self.auto_class, **self.options)[0].eval()

    @cached_property
    def tokenizer(self) -> Any:
        """The base's tokenizer."""
        return self.source.load_tokenizer()


def open_adapters(given: Sequence[str], opening: Opening) -> Opened:
    """Load the base of the adapters, and all of them on it.

    Args:
        given: for each adapter its folder or its name on the hub (USER/NAME, USER/NAME@REVISION); with NAME= before it
            if it is to have another name. With a base there may be none.
        opening: on which base, and what is allowed.

    Raises:
        UserError: a folder holds no adapter, the adapters belong to several bases or tasks, or do not fit the base.
    """
    folders = named_folders(given)
    records = {name: read_record(folder) for name, folder in folders.items()}
    bases = {name: record.base for name, record in records.items()}
    base, revision = opening.base, opening.revision
    if not given and base is None:
        raise UserError("Say which base: --base NAME.")
    if base is None:
        base = _agreed("base", {name: record.name for name, record in bases.items()})
        revision = revision or _agreed("revision", {name: record.revision for name, record in bases.items()})
    source = Source(str(base), revision, opening.trust_remote_code)
    tasks: dict[str, str | None] = {name: record.auto_class or _class_of(source) for name, record in bases.items()}
    auto_class = _agreed("task", tasks or {"base": _class_of(source)})
    held = {} if opening.dtype else _held({name: record.quantization for name, record in bases.items()})
    options = {"dtype": opening.dtype or "float32", "other_head": True, **held, **_labels(records)}
    model, new = source.load_model(auto_class, **options)
    opened = Opened(source, auto_class, model.eval(), Adapters(model), records, new, options)
    allowed = {"other_base": opening.other_base, "convert_pickle": opening.convert_pickle}
    for name, folder in folders.items():
        adapter = opened.adapters.load(folder, name, **allowed)
        if lost := sorted(set(new) - set(adapter.state())):
            raise UserError(f"The head is missing: neither {source.name} nor {folder} has weights for {listed(lost)}.")
    return opened


def named_folders(given: Sequence[str]) -> dict[str, Path]:
    """The folders by their adapters' names: those given, or else the name of the run or the folder.

    Raises:
        UserError: two have the same name, or one is not on the hub.
    """
    folders: dict[str, Path] = {}
    for each in given:
        name, mark, folder = each.rpartition("=")
        if not mark or Path(each).exists():
            name, folder = _name_of(Path(each)), each
        if name in folders:
            raise UserError(f"Two adapters would be called {name!r}: {folders[name]} and {folder}. "
                            f"Give one a name: NAME={folder}")  # fmt: skip
        folders[name] = adapter_folder(folder)
    return folders


def _name_of(folder: Path) -> str:
    parts = [part for part in folder.resolve().parts if part != "adapter"]
    return (parts[-1] if parts else "adapter").replace(".", "_").replace("@", "_")


def _agreed(what: str, values: dict[str, str | None]) -> Any:
    """The one value that all adapters have."""
    if len(set(values.values())) > 1:
        each = "; ".join(f"{name}: {value or 'not said'}" for name, value in values.items())
        raise UserError(f"The adapters do not have the same {what} ({each}), so they cannot share one model."
                        f"{' If these are names of one: --base NAME.' if what == 'base' else ''}")  # fmt: skip
    value = next(iter(values.values()))
    if value is None and what == "base":
        raise UserError(f"{listed(values)} does not say which base it was trained on: give it with --base.")
    return value


def _held(quantizations: dict[str, dict[str, Any] | None]) -> dict[str, Any]:
    """The way in which all adapters were trained on the base, as an option of `load_model`."""
    told = {name: str(Quantization.from_plain(value)) if value else "plain numbers"
            for name, value in quantizations.items()}  # fmt: skip
    if len(set(told.values())) > 1:
        each = "; ".join(f"{name}: {value}" for name, value in told.items())
        raise UserError(f"The adapters were trained on a base held in different ways ({each}). Say in which number "
                        "format all of them get it: --dtype float32")  # fmt: skip
    value = next(iter(quantizations.values()), None)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # where it will compute, as in its training
    return {"quantization": Quantization.from_plain(value), "device": device} if value else {}


def _class_of(source: Source) -> str:
    """The class for an adapter that does not say its task: that of the base's own files."""
    architecture = next(iter(source.load_config().architectures or ()), "")
    for ending, auto_class in _CLASSES_BY_ENDING.items():
        if ending in architecture:
            return auto_class
    return "AutoModel"


_CLASSES_BY_ENDING = {
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "ForImageClassification": "AutoModelForImageClassification",
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
}
"""By what the name of a base's class contains."""


def _labels(records: dict[str, Record]) -> dict[str, Any]:
    """The classes of the base's head, which each adapter brings with it: those of the first."""
    names = next((record.label_names for record in records.values() if record.label_names), None)
    if names is None:
        return {}
    numbered = dict(enumerate(names))
    return {"num_labels": len(names), "id2label": numbered, "label2id": {name: i for i, name in numbered.items()}}
