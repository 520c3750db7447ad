"""A new run that begins with an adapter's weights: for every strategy the same outputs, or what to do."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from models import inputs_for, make
from peftlight import attach
from peftlight.errors import UserError
from peftlight.interop import save_adapter
from peftlight.resume.init_adapter import InitialAdapter
from peftlight.strategies import LoRA
from peftlight.strategy import Adapter, PEFTStrategy
from peftlight.strategy_spec import as_strategy
from peftlight.tasks import SequenceClassification
from recipes import RECIPES
from tasks.small import stirred

SAVED_AS_ANOTHER = {"adalora", "hyperlora", "mam", "olora", "p_tuning", "pissa"}
"""Those of which only what they came to is saved; they cannot begin there again."""


def outputs(model: nn.Module) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(**inputs_for(model)).logits


def started(folder: Path, model: nn.Module, strategy: PEFTStrategy) -> Adapter:
    """As the task does it."""
    initial = InitialAdapter(str(folder))
    initial.take(SequenceClassification(model, strategy), model)
    adapter = attach(model, strategy, modules_to_train=["classifier"])
    initial.give(adapter)
    return adapter


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_the_new_adapter_computes_what_the_saved_one_does(name: str, tmp_path: Path) -> None:
    model, bare, strategy = make("bert"), make("bert"), RECIPES[name]()
    old = attach(model, RECIPES[name](), modules_to_train=["classifier"])
    stirred(old)
    save_adapter(old, tmp_path)
    if name in SAVED_AS_ANOTHER:
        with pytest.raises(UserError, match="is saved as"):
            started(tmp_path, make("bert"), strategy)
        strategy = as_strategy(json.loads((tmp_path / "peftlight.json").read_text())["strategy"])
    before = outputs(bare)
    new = started(tmp_path, bare, strategy)
    assert not torch.equal(outputs(bare), before)
    torch.testing.assert_close(outputs(bare), outputs(model), atol=1e-6 if name in SAVED_AS_ANOTHER else 0, rtol=0)
    assert all(parameter.requires_grad for parameter in new.parameters().values())


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    old = attach(make("bert"), LoRA(rank=2), modules_to_train=["classifier"])
    stirred(old)
    save_adapter(old, tmp_path, {"label_names": ["cold", "mild", "hot"]})
    return tmp_path


@pytest.mark.parametrize(
    ("strategy", "told"),
    [
        (LoRA(rank=4), r"has shape \(2, 32\) in .*, \(4, 32\) in the model"),
        (LoRA(rank=2, alpha=32), "scale is 8.0 there, 16.0 here"),
        (LoRA(rank=2, target_modules=["query"]), "not part of the model but in"),
    ],
)
def test_what_would_compute_something_else_is_refused(saved: Path, strategy: LoRA, told: str) -> None:
    with pytest.raises(UserError, match=told) as refused:
        started(saved, make("bert"), strategy)
    assert "It was trained by LoRA and is saved as LoRA with " in str(refused.value)
    assert "rank 2" in str(refused.value).partition("saved as")[2]
    started(saved, make("bert"), LoRA(rank=2, dropout=0.3))  # dropout decides how it trains, not what it computes


def test_a_run_without_an_adapter_says_how_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"state": "interrupted"}')
    with pytest.raises(UserError, match=r"says 'interrupted'\)\. To go on with it: --resume .*--ckpt_path .*last.ckpt"):
        InitialAdapter(str(tmp_path))


def test_the_strategy_is_told_whole_and_in_its_own_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ends = ("output.dense", "self.key", "self.query", "self.value")  # sorted, as in the file
    named = {"rank": 2, "target_modules": "attention", "rank_pattern": dict.fromkeys(ends, 2)}
    save_adapter(attach(make("bert"), LoRA(**named), modules_to_train=["classifier"]), tmp_path)
    with pytest.raises(UserError) as refused:
        started(tmp_path, make("bert"), LoRA(rank=8))
    pattern = str(named["rank_pattern"])
    assert f"LoRA with rank 2, rank_pattern {pattern}, target_modules attention." in str(refused.value)
    started(tmp_path, make("bert"), LoRA(**named))
    assert f"the adapter begins with the weights of {tmp_path}" in capsys.readouterr().out


def test_labels_in_another_order_are_refused(saved: Path) -> None:
    model = make("bert")
    module = SequenceClassification(model, LoRA(rank=2))
    module.label_names = ["cold", "mild", "hot"]
    InitialAdapter(str(saved)).take(module, model)
    module.label_names = ["hot", "mild", "cold"]
    with pytest.raises(UserError, match="in this order; the data has"):
        InitialAdapter(str(saved)).take(module, model)


def test_another_base_is_refused(saved: Path) -> None:
    other = make("bert")
    with torch.no_grad():
        other.bert.embeddings.word_embeddings.weight.add_(1)  # type: ignore[operator]
    with pytest.raises(UserError, match="trained on another base"):
        InitialAdapter(str(saved)).take(SequenceClassification(other, LoRA(rank=2)), other)
