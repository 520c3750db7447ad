"""`peftlight.json`: where an adapter comes from, what it was trained on, and the checksum of its tensors."""

import dataclasses
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypedDict, TypeVar, get_type_hints

import torch

from peftlight import __version__
from peftlight.class_paths import definitions
from peftlight.errors import UserError, is_one_line
from peftlight.interop.base_hash import Fingerprint, fingerprint
from peftlight.interop.contents import Tensors
from peftlight.interop.hf.frame import base_name
from peftlight.interop.hf.targets import task_of
from peftlight.strategy import Adapter, PEFTStrategy
from peftlight.strategy_spec import StrategySpec, kinds_in, spec_of
from peftlight.typed import misfit

FILE = "peftlight.json"
FORMAT = 2
"""Version of the files' format; a reader refuses a newer one."""

T = TypeVar("T")
_AUTO_CLASS = re.compile(r"AutoModel(For[A-Za-z0-9]+)?", re.ASCII)
"""Others in transformers do not load a model, and a file must not choose among all that it has."""


class DataRecord(TypedDict, total=False):
    """The data that an adapter was trained on."""

    source: str | None
    fingerprint: str | None
    encoder: Any
    """How its rows are put to a model, as `data.encoder.Encoder.settings`; damaged, it matters to prompts alone."""


@dataclass(frozen=True)
class BaseRecord:
    """The base that an adapter was trained on; what is not known is None."""

    name: str | None = None
    """As the user wrote it: a hub id, a folder, a package."""
    revision: str | None = None
    auto_class: str | None = None
    """The class of transformers that made the model."""
    trust_remote_code: bool | None = None
    quantization: dict[str, Any] | None = None
    """How its linear layers were held in few bits; None: as plain numbers."""
    dtype: str | None = None
    shapes: str | None = None
    weights: str | None = None
    """These three are those of `base_hash.Fingerprint`."""

    @property
    def fingerprint(self) -> Fingerprint:
        return Fingerprint(self.dtype, self.shapes, self.weights)


@dataclass(frozen=True)
class Record:
    """What `peftlight.json` says; what it does not say is None, and so is everything for an adapter without one."""

    base: BaseRecord = field(default_factory=BaseRecord)
    task: str | None = None
    """Name of the task's class."""
    label_names: list[str] | None = None
    data: DataRecord | None = None
    metrics: dict[str, float | None] | None = None
    """Those of the adapter itself, as last logged; None where one was not a finite number."""
    steps: int | None = None
    seed: int | None = None
    strategy: StrategySpec | None = None
    """The strategy as saved, and as it was trained:"""
    trained_by: StrategySpec | None = None
    trained: list[str] | None = None
    """Modules and parameters of the base trained in place."""
    folds: bool | None = None
    """Whether weights of the base can hold it; a prompt or a bottleneck cannot be merged."""
    defined_in: dict[str, str] | None = None
    """For the path of each class that is not of peftlight, the file or module to import; nothing here imports it."""
    versions: dict[str, str] | None = None
    format: int | None = None
    sha256: str | None = None


def describe(adapter: Adapter, recipe: PEFTStrategy, tensors: Tensors, given: Mapping[str, Any]) -> dict[str, Any]:
    """The origin of a finished adapter, trained by `recipe`, that is saved as these tensors; all but their checksum.

    Raises:
        UserError: a field of the `given` record has a value of another kind than `Record` says.
    """
    versions = {"peftlight": __version__, "torch": str(torch.__version__)}
    if "transformers" in sys.modules:
        versions["transformers"] = str(sys.modules["transformers"].__version__)
    as_record({**given, "format": FORMAT})  # so that what is written can be read again
    base = dict(given.get("base") or {})
    base |= {
        "name": base.get("name") or base_name(adapter.model) or None,
        "auto_class": base.get("auto_class") or _CLASSES_BY_TASK.get(str(task_of(adapter.model))),
    }
    return {
        **{name: value for name, value in given.items() if name != "defined_in"},
        "base": base | dataclasses.asdict(fingerprint(adapter, tensors)),
        "format": FORMAT,
        "strategy": spec_of(adapter.strategy),
        "trained_by": spec_of(recipe),
        "trained": adapter.trained,
        "folds": all(delta.folds for delta in adapter.sites.values()),
        **_definitions(adapter, recipe, given),
        "versions": versions,
    }


def _definitions(adapter: Adapter, recipe: PEFTStrategy, given: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """`defined_in`, for the strategies and what else is given; nothing where all classes are ours."""
    kinds = [*kinds_in(recipe), *kinds_in(adapter.strategy)]
    found = {**given.get("defined_in", {}), **definitions(kinds)}
    return {"defined_in": found} if found else {}


def as_record(origin: Mapping[str, Any]) -> Record:
    """The record that a file holds, of this format or of an older one.

    Raises:
        UserError: the format is newer, or a field holds another kind of value.
    """
    record = _as_record(origin)
    _check_base(record.base, FILE)
    if record.task is not None and not is_one_line(record.task):
        raise UserError(f"{FILE}: task is {record.task!r}; expected the name of a class.")
    if odd := [text for pair in (record.defined_in or {}).items() for text in pair if not is_one_line(text)]:
        raise UserError(
            f"{FILE}: defined_in holds {odd[0]!r}; expected names of classes and of files, each in one line."
        )
    return record


def _as_record(origin: Mapping[str, Any]) -> Record:
    version = origin.get("format")
    if not isinstance(version, int) or isinstance(version, bool) or not 1 <= version <= FORMAT:
        raise UserError(f"{FILE} says format {version!r}; this version of peftlight knows 1 to {FORMAT}.")
    base = origin.get("base", {}) if version > 1 else {"name": origin.get("base_model") or None}
    if not isinstance(base, dict):
        raise UserError(f"{FILE}: base is {base!r}; expected an object.")
    return _filled(Record, {**origin, "base": _filled(BaseRecord, base, "base.")})


def check_sum(record: Record, sha256: str, file: str) -> None:
    """See that the file of tensors is the one that was saved with the record.

    Raises:
        UserError: it is not.
    """
    if record.sha256 != sha256:
        raise UserError(
            f"{file} is not the file that was saved: its checksum is not the one in {FILE}. It was damaged, or another "
            f"program replaced it; if that was on purpose, delete {FILE}."
        )


def record_of_peft(config: Mapping[str, Any]) -> Record:
    """What HF PEFT's config says of the base, for an adapter without a record.

    Raises:
        UserError: the base's name or revision is not in one line.
    """
    name, revision = (config.get(field) for field in ("base_model_name_or_path", "revision"))
    named, fixed = (value if isinstance(value, str) and value else None for value in (name, revision))
    base = BaseRecord(named, fixed, _CLASSES_BY_TASK.get(str(config.get("task_type"))))
    _check_base(base, "adapter_config.json")
    return Record(base)


def _check_base(base: BaseRecord, file: str) -> None:
    """See that what is shown, put into command lines, and looked up in transformers is no more than a name."""
    for name, value in vars(base).items():
        if isinstance(value, str) and not is_one_line(value):
            raise UserError(f"{file}: base.{name} is {value!r}; expected text in one line, without control characters.")
    if base.auto_class is not None and not _AUTO_CLASS.fullmatch(base.auto_class):
        raise UserError(f"{file}: base.auto_class is {base.auto_class!r}; expected AutoModel, or AutoModelFor and what "
                        "for.")  # fmt: skip


_CLASSES_BY_TASK = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""The class of transformers for each `task_type` of HF PEFT's."""


def _filled(kind: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """The dataclass with those of the values that are its fields."""
    if wrong := misfit(values, kind):
        raise UserError(f"{FILE}: {where}{wrong[0]} is {values[wrong[0]]!r}; expected {wrong[1]}.")
    return kind(**{name: values[name] for name in get_type_hints(kind) if name in values})
