"""Convolutional networks: each strategy keeps every promise there, or says by name why not and what does."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BitConfig, BitForImageClassification, RegNetConfig, RegNetForImageClassification

from models import CONVOLUTIONAL, inputs_for, make
from peftlight import attach, load_adapter, save_adapter
from peftlight.cli import main
from peftlight.errors import UserError
from peftlight.strategies import LoRA
from peftlight.testing import check_strategy
from peftlight.testing.conformance import PROCESSES, Tiny
from peftlight.train_mode import put_in_train_mode
from recipes import CONFIGS, RECIPES

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

OF_CONVOLUTIONS = {"bitfit", "dora", "full", "lora", "lora_plus", "rslora"}
WITH_LINEAR_LAYERS = OF_CONVOLUTIONS | {
    "adalora", "bitfit_subset", "eva", "hyperlora", "ia3", "layer_norm", "olora", "parallel_adapter", "pfeiffer",
    "pissa", "vera",
}  # fmt: skip
SERVED = {"convnext": WITH_LINEAR_LAYERS, "resnet": OF_CONVOLUTIONS, "mobilenet": OF_CONVOLUTIONS}
SUBJECTS = {
    "prompt": "PromptTuning", "p_tuning": "PTuning", "vera": "VeRA",
    "trainable_tokens": "TrainableTokens", "adalora": "AdaLoRA", "ia3": "IA3", "layer_norm": "LayerNormTuning",
    "hyperlora": "HyperLoRA", "compacter": "Compacter", "bitfit_subset": "BitFit with biases query+mlp",
    "eva": "LoRA with init_lora_weights eva", "olora": "LoRA with init_lora_weights olora",
    "pissa": "LoRA with init_lora_weights pissa",
}  # fmt: skip
"""By what name a strategy speaks of itself; the others are bottleneck adapters."""


CASES = [(model, recipe) for model in CONVOLUTIONAL for recipe in RECIPES
         if model != "mobilenet" or recipe in ("lora", "full", "ia3")]  # fmt: skip
"""MobileNetV2 has many layers, and takes long."""


@pytest.mark.parametrize(("model", "recipe"), CASES)
def test_every_promise_is_kept_or_the_strategy_says_what_to_choose(model: str, recipe: str) -> None:
    models = {model: (Tiny(model), inputs_for(model))}
    if recipe in SERVED[model]:
        results = check_strategy(RECIPES[recipe], models, leave_out=[PROCESSES, "compiles"])
        assert {result.outcome for result in results} == {"kept"}
        merged = next(result.remark for result in results if result.check == "merges")
        assert ("does not merge" in merged) == (recipe in ("parallel_adapter", "pfeiffer"))
        return
    with pytest.raises(UserError) as raised:
        attach(make(model), RECIPES[recipe]())
    said = str(raised.value)
    subject = re.escape(SUBJECTS.get(recipe, "BottleneckAdapter"))
    subject = "Prefix ?[tT]uning" if recipe in ("mam", "prefix") else subject
    assert re.match(rf"(target_modules: .*)?{subject}", said)
    assert re.search(r"[Cc]hoose (BitFit|LoRA)", said)  # both are served
    assert type(make(model)).__name__ in said or "is none" in said


def test_all_linear_on_a_model_without_linear_layers_says_how_convolutions_are_chosen() -> None:
    model = make("resnet")
    with pytest.raises(UserError, match=r"no linear layer outside its head\. Leave target_modules out: then its 9"):
        attach(model, LoRA(target_modules="all-linear"))
    assert len(attach(model, LoRA()).sites) == 9
    named = attach(make("resnet"), LoRA(target_modules=["convolution"]))
    assert len(named.sites) == 9


def test_what_is_chosen_merges_so_convolutions_of_groups_are_not() -> None:
    model = make("mobilenet")
    adapter = attach(model, LoRA(rank=2))
    groups = {m.groups for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and name in adapter.sites}
    assert groups == {1}
    assert any(isinstance(m, nn.Conv2d) and m.groups > 1 for m in model.modules())
    adapter.merge()


def test_the_ranks_that_the_error_proposes_fit() -> None:
    sizes: dict[str, Any] = {"embedding_size": 16, "hidden_sizes": [16, 40], "depths": [1, 1], "groups_width": 8}
    model = RegNetForImageClassification(RegNetConfig(**sizes, num_labels=3))  # squeezes to few channels
    with pytest.raises(UserError, match="rank_pattern") as raised:
        attach(model, LoRA())
    proposed = re.findall(r"(\S+): (\d+)", str(raised.value).partition("rank_pattern: {")[2].partition("}")[0])
    pattern = {name: int(rank) for name, rank in proposed}
    assert attach(model, LoRA(rank_pattern=pattern)).sites


def test_a_convolution_that_changes_its_weight_first_is_left_alone() -> None:
    sizes: dict[str, Any] = {"embedding_size": 32, "hidden_sizes": [32, 32], "depths": [1, 1], "num_groups": 4}
    model = BitForImageClassification(BitConfig(**sizes, layer_type="bottleneck", num_labels=3))
    with pytest.raises(UserError, match="WeightStandardizedConv2d, which does not convolve with its weight as it is"):
        attach(model, LoRA(rank=2, target_modules=["conv1"]))


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_a_loop_of_ones_own_keeps_the_running_statistics_of_a_frozen_base(trained: bool, tmp_path: Path) -> None:
    model, inputs = make("resnet"), inputs_for("resnet")
    adapter = attach(model, RECIPES["full"]() if trained else LoRA(rank=2))
    before = {name: value.clone() for name, value in model.named_buffers() if "running" in name}
    optimizer = torch.optim.SGD(adapter.parameters().values(), lr=0.1)
    for _ in range(2):
        put_in_train_mode(adapter)
        model(**inputs).loss.backward()
        optimizer.step()
    moved = [name for name, value in model.named_buffers() if name in before and not torch.equal(value, before[name])]
    assert bool(moved) == trained
    save_adapter(adapter, tmp_path)
    fresh = make("resnet")
    load_adapter(fresh, tmp_path)
    pixels = inputs["pixel_values"]
    assert torch.equal(fresh.eval()(pixel_values=pixels).logits, model.eval()(pixel_values=pixels).logits)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["resnet", "mobilenet"])
def test_the_command_line_trains_evaluates_and_merges_one(name: str, tmp_path: Path) -> None:
    make(name).save_pretrained(tmp_path / "base")  # type: ignore[operator]
    plain = ["--data.image_size=32", "--data.image_mean=[0.5,0.5,0.5]", "--data.image_std=[0.5,0.5,0.5]"]
    given = ["--config", str(CONFIGS / "lora.yaml"), "--config", str(CONFIGS / "data" / "images.yaml"), *plain,
             f"--model.base_model={tmp_path / 'base'}", "--data.source=sample:shapes",
             f"--trainer.default_root_dir={tmp_path / 'runs'}", "--trainer.max_epochs=1",
             "--trainer.limit_train_batches=2", "--trainer.accelerator=cpu",
             "--trainer.enable_progress_bar=false"]  # fmt: skip
    assert main(["fit", *given]) == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert main(["evaluate", str(run)]) == 0
    assert main(["merge", str(run), str(tmp_path / "merged")]) == 0  # it proves that it computes the same
