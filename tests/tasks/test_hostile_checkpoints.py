"""A checkpoint may come from anyone: no code that it names runs, whatever Lightning would do with it."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from models import make
from peftlight.data import TextClassification
from peftlight.errors import UserError
from peftlight.strategies import LoRA
from peftlight.tasks import SequenceClassification
from tasks.small import QUIET, batches, class_rows, loader, quiet_trainer

pytestmark = QUIET
ROWS = class_rows([5, 9, 4, 12], [0, 1, 2, 1])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a base in a folder."""
    folder = tmp_path_factory.mktemp("trained")
    make("bert").save_pretrained(folder / "bert")
    module = SequenceClassification(str(folder / "bert"), LoRA(rank=2), num_labels=3)
    trainer = quiet_trainer(folder, max_epochs=1)
    trainer.fit(module, loader(batches(ROWS, 2)))
    trainer.save_checkpoint(folder / "good.ckpt")
    return folder / "good.ckpt"


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], bool]:
    """A module that nobody has imported; the answer is whether it was."""
    (tmp_path / "not_imported_yet.py").write_text(
        "from pathlib import Path\nPath(__file__).with_name('it_ran').touch()\n"
        "from torch.optim import SGD as Thing\ndef call(*args): raise SystemExit('it ran')\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "not_imported_yet", raising=False)
    return (tmp_path / "it_ran").exists


_OURS = "peftlight.tasks.sequence_classification.SequenceClassification"
_LIGHTNINGS = "lightning.pytorch.cli.instantiate_module"
_THING = {"class_path": "not_imported_yet.Thing", "init_args": {"lr": 0.1}}
HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "a function": ({"_instantiator": "not_imported_yet.call"}, r"_instantiator is 'not_imported_yet\.call'"),
    "a class": ({"_instantiator": _LIGHTNINGS, "_class_path": "not_imported_yet.Thing"}, "_instantiator is"),
    # What stands below is imported by Lightning 2.6.6 too, which judges the class alone and not its arguments.
    "an argument's class": (
        {"_instantiator": _LIGHTNINGS, "_class_path": _OURS, "optimizer": _THING},
        "_instantiator is",
    ),
    "an optimizer": ({"optimizer": _THING}, r"optimizer names the class not_imported_yet\.Thing.*optimizer=\.\.\."),
    "a class in a list": ({"label_names": [{"class_path": "a.B"}]}, r"label_names names the class a\.B"),
    "a strategy": ({"strategy": {**_THING, "init_args": {}}}, r"strategy not_imported_yet\.Thing is not known"),
    "no strategy": ({"strategy": "LoRA"}, "strategy is no strategy"),
    "trust in the base's code": ({"trust_remote_code": True}, "trust_remote_code is true.*if you trust it"),
    "an object": ({"dtype": torch.float32}, "dtype holds a dtype"),
    "another kind": ({"num_labels": "three"}, r"num_labels is 'three'; expected int \| None"),
    "a name that is none": ({7: 1}, "not names with values"),
}


def _with(checkpoint: Path, change: dict[Any, Any], to: Path) -> Path:
    content = torch.load(checkpoint, weights_only=True)
    content["hyper_parameters"] |= change
    torch.save(content, to)
    return to


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_a_checkpoint_names_does_not_run(
    kind: str, trained: Path, tmp_path: Path, code: Callable[[], bool]
) -> None:
    change, words = HOSTILE[kind]
    path = _with(trained, change, tmp_path / "hostile.ckpt")
    with pytest.raises(UserError, match=words):
        SequenceClassification.load_from_checkpoint(path)
    assert not code()


def test_what_is_given_stands_above_what_a_checkpoint_says(trained: Path, tmp_path: Path) -> None:
    path = _with(trained, {"trust_remote_code": True, "dtype": torch.float32}, tmp_path / "a.ckpt")
    loaded = SequenceClassification.load_from_checkpoint(path, trust_remote_code=True, dtype="float32")
    assert loaded.source is not None
    assert loaded.source.trust_remote_code
    assert isinstance(loaded, SequenceClassification)
    model = make("bert")
    again = SequenceClassification.load_from_checkpoint(
        _with(trained, {"trust_remote_code": True}, path), base_model=model
    )
    assert again.model is model  # whose code has run already


def test_another_way_to_read_a_checkpoint_is_refused(trained: Path, tmp_path: Path) -> None:
    for options in ({"weights_only": False}, {"hparams_file": tmp_path / "hparams.yaml"}):
        with pytest.raises(UserError, match=r"weights_only is false|hparams_file is not read"):
            SequenceClassification.load_from_checkpoint(trained, **options)
    with pytest.raises(UserError, match="no checkpoint http"):
        SequenceClassification.load_from_checkpoint("https://example.org/a.ckpt")
    loaded = SequenceClassification.load_from_checkpoint(trained)
    with pytest.raises(TypeError, match="cannot be called on an instance"):
        loaded.load_from_checkpoint(trained)


def test_a_checkpoint_of_another_program_is_refused_by_what_it_lacks(trained: Path, tmp_path: Path) -> None:
    content = torch.load(trained, weights_only=True)
    del content["hyper_parameters"]
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=r"does not say its base_model, strategy.*base_model=\.\.\., strategy=\.\.\.\)"):
        SequenceClassification.load_from_checkpoint(tmp_path / "a.ckpt")


def test_data_takes_nothing_from_a_checkpoint(trained: Path, tmp_path: Path, code: Callable[[], bool]) -> None:
    content = torch.load(trained, weights_only=True)
    content["datamodule_hyper_parameters"] = {"_instantiator": "not_imported_yet.call"}
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match="holds no settings of data"):
        TextClassification.load_from_checkpoint(tmp_path / "a.ckpt")
    assert not code()
