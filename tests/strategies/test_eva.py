"""EVA against one decomposition of all activations, and against HF PEFT's; its ranks survive saving and resuming."""

import copy
import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_eva_state_dict
from torch import Tensor, nn

from models import inputs_for, make
from peftlight import Adapter, attach, load_adapter, save_adapter
from peftlight.errors import UserError
from peftlight.strategies import LoRA
from peftlight.strategies.lora_eva import Directions, redistributed
from peftlight.strategy import Material
from peftlight.tasks import SequenceClassification
from strategies.against_peft import assert_near, losses, output
from tasks.small import QUIET, assert_equal_states, batches, class_rows, constant, loader, quiet_trainer

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore")]

BATCHES = 6


def settling(name: str) -> nn.Module:
    """The model with activations that vary most in a few directions, as those of pretrained models do."""
    model = make(name)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.shape == (32,) and key.endswith("weight"):
                parameter.mul_(0.6 ** torch.arange(32))
    return model


def inputs_of(name: str) -> list[dict[str, Tensor]]:
    made = [inputs_for(name, seed=seed, batch=8, length=12) for seed in range(BATCHES)]
    return [{key: value for key, value in inputs.items() if key != "labels" or name == "t5"} for inputs in made]


def material(name: str, times: int = 1) -> Material:
    return Material(lambda: inputs_of(name) * times, lambda text: [])


def prepared(name: str, strategy: LoRA, times: int = 1, **options: Any) -> Adapter:
    adapter = attach(settling(name), strategy, **options)
    strategy.prepare(adapter, material(name, times))
    return adapter


def activations(name: str, sites: Any) -> dict[str, Tensor]:
    """The inputs of the layers at all tokens that are no padding, gathered from all batches."""
    model, seen = settling(name), {site: [] for site in sites}
    for inputs in inputs_of(name):
        kept = inputs["attention_mask"].bool() if "attention_mask" in inputs else None
        handles = []
        for site in sites:

            def look(module: nn.Module, args: Any, _output: Any, site: str = site, kept: Any = kept) -> None:
                fits = kept is not None and args[0].shape[:2] == kept.shape
                seen[site].append(args[0][kept] if fits else args[0].flatten(0, -2))

            handles.append(model.get_submodule(site).register_forward_hook(look))
        with torch.no_grad():
            model(**inputs)
        for handle in handles:
            handle.remove()
    return {site: torch.cat(rows).double() for site, rows in seen.items()}


def test_batch_by_batch_equals_all_at_once() -> None:
    torch.manual_seed(0)
    rows = torch.randn(400, 20) @ torch.diag(0.6 ** torch.arange(20)) @ torch.randn(20, 20) + torch.randn(20)
    directions = Directions(6)
    for batch in rows.split([3, 90, 7, 150, 150]):  # the first has fewer rows than there are components
        directions.add(batch)
    centred = rows.double() - rows.double().mean(0)
    _, sigma, v = torch.linalg.svd(centred, full_matrices=False)
    cosines = (directions.components.double() * v[:6]).sum(1).abs()
    assert cosines.min() > 0.9999
    assert_near(directions.shares.double(), (sigma.square() / sigma.square().sum())[:6], 1e-4)


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "t5", "vit"])
def test_a_spans_the_leading_directions_of_all_activations(name: str) -> None:
    """And it is in the order of the variance that they explain."""
    strategy = LoRA(rank=3, init_lora_weights="eva", eva_rho=1, target_modules="attention")
    adapter = prepared(name, strategy, times=3)
    for site, rows in activations(name, adapter.sites).items():
        A = adapter.sites[site].get_parameter("A").detach().double()
        assert_near(A @ A.T, torch.eye(3, dtype=torch.float64), 1e-5)
        centred = rows - rows.mean(0)
        _, sigma, _ = torch.linalg.svd(centred, full_matrices=False)
        explained = (centred @ A.T).square().sum() / sigma[:3].square().sum()
        assert explained > 0.97, (site, explained)
        assert adapter.sites[site].get_parameter("B").abs().max() == 0


@pytest.mark.parametrize("rho", [1.0, 2.0])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_ranks_and_directions_equal_hf_pefts(name: str, rho: float) -> None:
    """On activations that settle, so that it hardly matters when each side stops; no layer is left without a rank."""
    targets = ["query", "dense"] if name == "bert" else ["q_proj", "down_proj"]
    excluded = ["classifier", "pooler"] if name == "bert" else None
    strategy = LoRA(rank=3, init_lora_weights="eva", eva_rho=rho, target_modules=targets, exclude_modules=excluded)
    adapter = prepared(name, strategy, times=8)
    config = LoraConfig(
        r=3,
        target_modules=list(adapter.sites),
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=rho, tau=0.99),
    )
    theirs = get_eva_state_dict(settling(name), inputs_of(name), config, show_progress_bar=False)
    theirs = {key.removeprefix("base_model.model."): value for key, value in theirs.items()}
    ours = {site: delta.get_parameter("A") for site, delta in adapter.sites.items()}
    assert {site: len(A) for site, A in ours.items()} == {site: len(A) for site, A in theirs.items()}
    for site, A in ours.items():
        shared = (A.detach() @ theirs[site].to(A.dtype).T).square().sum() / len(A)  # of the two spaces; 1: the same
        assert shared > 0.95, (site, shared)


def test_padding_is_not_looked_at() -> None:
    def directions(padding: int) -> dict[str, Tensor]:
        strategy = LoRA(rank=2, init_lora_weights="eva", eva_rho=1)
        adapter = attach(settling("bert"), strategy)
        torch.manual_seed(0)
        rows = {"input_ids": torch.randint(2, 100, (6, 9)), "attention_mask": torch.ones(6, 9, dtype=torch.long)}
        padded = {key: nn.functional.pad(value, (0, padding)) for key, value in rows.items()}
        strategy.prepare(adapter, Material(lambda: [padded], lambda text: []))
        return {site: delta.get_parameter("A").detach() for site, delta in adapter.sites.items()}

    plain, padded = directions(0), directions(20)
    for site, A in plain.items():
        assert_near((A @ padded[site].T).abs(), torch.eye(2), 1e-2)


def test_ranks_move_to_where_the_variance_is_and_keep_their_sum() -> None:
    shares = {"a": torch.tensor([0.5, 0.3, 0.1, 0.05]), "b": torch.tensor([0.2, 0.1, 0.02]), "c": torch.tensor([0.001])}
    assert redistributed(shares, {"a": 2, "b": 2, "c": 2}) == {"a": 3, "b": 2, "c": 1}
    assert redistributed(shares, {"a": 1, "b": 1, "c": 1}) == {"a": 1, "b": 1, "c": 1}


@pytest.mark.parametrize("rslora", [False, True])
def test_scales_stay_and_the_recipe_says_the_ranks(rslora: bool) -> None:
    strategy = LoRA(rank=4, alpha=6, init_lora_weights="eva", target_modules="all-linear", use_rslora=rslora)
    before = {site: delta.scale for site, delta in attach(make("bert"), copy.deepcopy(strategy)).sites.items()}
    adapter = prepared("bert", strategy)
    ranks = {site: len(delta.get_parameter("A")) for site, delta in adapter.sites.items()}
    assert sum(ranks.values()) == 4 * len(ranks)
    assert len(set(ranks.values())) > 1
    assert max(ranks.values()) <= 8
    again = attach(make("bert"), replace(strategy))
    assert {site: len(delta.get_parameter("A")) for site, delta in again.sites.items()} == ranks
    for site, delta in again.sites.items():
        assert delta.scale == pytest.approx(before[site], rel=1e-12)


def test_a_limit_is_the_layers_own_width() -> None:
    strategy = LoRA(rank=3, init_lora_weights="eva", eva_rho=4, target_modules=["0", "2"])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4))
    adapter = attach(_Called(model), strategy)
    x = torch.randn(100, 16) * 1e-3
    strategy.prepare(adapter, Material(lambda: [{"x": x}], lambda text: []))
    assert sorted(len(delta.get_parameter("A")) for delta in adapter.sites.values())[0] >= 2
    assert len(adapter.sites["model.2"].get_parameter("A")) <= 4


class _Called(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.model(x)
        return y


def test_looking_stops_once_the_directions_stand_still() -> None:
    taken = 0

    def endless() -> Iterator[dict[str, Tensor]]:
        nonlocal taken
        while True:
            taken += 1
            yield inputs_of("bert")[taken % BATCHES]

    strategy = LoRA(rank=2, init_lora_weights="eva")
    strategy.prepare(attach(make("bert"), strategy), Material(endless, lambda text: []))
    assert 2 <= taken < 60


def test_directions_that_still_move_are_announced(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "peftlight"):
        prepared("bert", LoRA(rank=8, init_lora_weights="eva", eva_tau=1.0))
    assert "EVA used all 6 batches" in caplog.text


def test_it_trains_after_it_saw_data_and_not_before() -> None:
    model, strategy = make("bert"), LoRA(rank=4, init_lora_weights="eva")
    adapter = attach(model, strategy)
    before = output(model, inputs_for("bert"))
    with pytest.raises(UserError, match=r"data that it has not seen.*strategy.prepare\(adapter, material\)"):
        model.train()(**inputs_for("bert"))
    strategy.prepare(adapter, material("bert"))
    assert model.training
    assert torch.equal(output(model.eval(), inputs_for("bert")), before)
    seen = losses(model, list(adapter.parameters().values()), inputs_for("bert"), steps=10)
    assert seen[-1] < seen[0]


def test_inputs_that_are_not_finite_are_named() -> None:
    model, strategy = make("bert"), LoRA(rank=4, init_lora_weights="eva")
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.bias[3] = torch.inf
    adapter = attach(model, strategy)
    with pytest.raises(UserError, match=r"those of bert.encoder.layer.1.attention.self.query are not finite"):
        strategy.prepare(adapter, material("bert"))


def test_too_few_tokens_and_unused_layers_are_refused() -> None:
    strategy = LoRA(rank=8, init_lora_weights="eva")
    few = [{"input_ids": torch.tensor([[3, 4]])}]
    with pytest.raises(UserError, match="more tokens than the 1 batches hold"):
        strategy.prepare(attach(make("bert"), strategy), Material(lambda: few, lambda text: []))
    strategy = LoRA(rank=2, init_lora_weights="eva", target_modules=["0", "1"])
    model = _First(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)))
    with pytest.raises(UserError, match=r"no input of model.1 in 1 batches"):
        strategy.prepare(attach(model, strategy), Material(lambda: [{"x": torch.randn(9, 6)}], lambda text: []))


class _First(_Called):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.model[0](x)  # type: ignore[index]
        return y


def stirred(adapter: Adapter) -> nn.Module:
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in adapter.parameters().values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return adapter.model


@pytest.mark.parametrize("rslora", [False, True])
def test_hf_peft_and_we_read_what_is_saved(rslora: bool, tmp_path: Path) -> None:
    strategy = LoRA(rank=4, init_lora_weights="eva", target_modules="all-linear", use_rslora=rslora)
    adapter = prepared("bert", strategy, modules_to_train=["classifier"])
    expected = output(stirred(adapter), inputs_for("bert"))
    save_adapter(adapter, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    assert_near(output(load_adapter(settling("bert"), tmp_path).model, inputs_for("bert")), expected, 1e-6)
    assert_near(output(PeftModel.from_pretrained(settling("bert"), tmp_path), inputs_for("bert")), expected, 1e-6)


def test_a_state_of_settled_ranks_fits_a_fresh_adapter() -> None:
    """So that a training can be resumed with the recipe as it was written."""
    strategy = LoRA(rank=4, init_lora_weights="eva", target_modules="all-linear")
    first = copy.deepcopy(strategy)
    adapter = prepared("bert", strategy)
    expected = output(stirred(adapter), inputs_for("bert"))
    resumed = attach(settling("bert"), first)
    resumed.load_state(adapter.state())
    assert_near(output(resumed.model, inputs_for("bert")), expected, 1e-6)
    resumed.model.train()(**inputs_for("bert"))
    assert resumed.finished().strategy.rank_pattern == strategy.rank_pattern  # type: ignore[attr-defined]
    plain = attach(make("bert"), LoRA(rank=4, target_modules="all-linear"))
    with pytest.raises(UserError, match="has shape"):
        plain.load_state(adapter.state())


def module() -> SequenceClassification:
    strategy = LoRA(rank=4, init_lora_weights="eva", target_modules="all-linear", lora_plus_ratio=4.0)
    return SequenceClassification(make("bert"), strategy, trained_modules=["classifier"], lr_scheduler=constant)


def test_a_base_in_half_precision(tmp_path: Path) -> None:
    """The head stays in float32, so the looking happens under the training's autocast too."""
    strategy = LoRA(rank=2, init_lora_weights="eva")
    task = SequenceClassification(make("bert").bfloat16(), strategy, trained_modules=["classifier"])
    data = loader(batches(class_rows([9, 8, 7, 6], [0, 2, 1, 1]), 2))
    quiet_trainer(tmp_path, precision="bf16-mixed").fit(task, data)
    assert task.verdict is not None
    assert not task.verdict.still


def test_plain_lora_looks_at_no_data() -> None:
    assert not LoRA().uses("prepare")
    assert LoRA(init_lora_weights="eva").uses("prepare")


def test_a_fit_looks_at_the_data_first_and_resumes_to_the_same_end(tmp_path: Path) -> None:
    data = loader(batches(class_rows([5, 39, 3, 40, 17, 2, 33, 9] * 2, [0, 2, 1, 1, 1, 0, 0, 2] * 2), 4))
    whole = module()
    quiet_trainer(tmp_path, max_epochs=2).fit(whole, data)
    half = module()
    trainer = quiet_trainer(tmp_path, max_epochs=2, max_steps=4)
    trainer.fit(half, data)
    trainer.save_checkpoint(tmp_path / "half.ckpt", weights_only=False)
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert saved["hyper_parameters"]["strategy"]["init_args"]["rank_pattern"]
    resumed = module()
    quiet_trainer(tmp_path, max_epochs=2).fit(resumed, data, ckpt_path=tmp_path / "half.ckpt")
    assert whole.adapter is not None
    assert resumed.adapter is not None
    ours, other = whole.adapter.state(), resumed.adapter.state()
    assert_equal_states(ours, other, rtol=1e-5, atol=1e-6)
    assert len({len(delta.get_parameter("A")) for delta in whole.adapter.sites.values()}) > 1
