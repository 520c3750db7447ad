"""AdaLoRA through files: ours read by HF PEFT and HF PEFT's by us, in the middle of a training and after it."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from interop.exchange import changed
from models import MODELS, inputs_for, make
from peftlight import Adapter, attach, load_adapter, save_adapter
from peftlight.errors import UserError
from peftlight.strategies import AdaLoRA
from strategies.against_peft import assert_near, loss_of, output

pytestmark = pytest.mark.filterwarnings("ignore")

TARGETS = {
    "bert": ["query", "value"],
    "roberta": ["query", "key", "value"],
    "llama": ["q_proj", "v_proj"],
    "gpt2": ["c_attn", "c_proj"],
    "t5": ["q", "k", "v", "o", "wi", "wo"],
    "vit": ["q_proj", "v_proj"],
    "llama_classifier": ["q_proj", "v_proj"],
}
HEADS = {"bert": ["classifier"], "roberta": ["classifier"], "vit": ["classifier"], "llama_classifier": ["score"]}
STEPS = 8
MOMENTS = {"at the start": 0, "before the first allocation": 2, "in the middle": 4, "at the end": 8}


def inputs_of(name: str) -> dict[str, Tensor]:
    """Without labels: HF PEFT's AdaLoRA for inference fails on them."""
    return {key: value for key, value in inputs_for(name.removesuffix("_classifier")).items() if key != "labels"}


@torch.no_grad()
def computed(model: nn.Module, name: str) -> Tensor:
    inputs = inputs_of(name)
    if name == "t5":
        inputs["decoder_input_ids"] = inputs_for(name)["labels"]
    return output(model.eval(), inputs)


def steps(model: nn.Module, parameters: list[nn.Parameter], name: str, after: Any, until: int) -> None:
    batch = inputs_for("bert" if name.endswith("classifier") else name)
    optimizer = torch.optim.AdamW(parameters, lr=0.01)
    for step in range(1, until + 1):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
        after(step)


def ours(name: str, until: int, **fields: Any) -> tuple[nn.Module, Adapter]:
    """The untouched base, and an adapter in its training."""
    base = make(name)
    settings = {"init_r": 5, "target_r": 1, "alpha": 12, "initial_phase": 2, "final_phase": 2}
    strategy = AdaLoRA(**{**settings, "target_modules": TARGETS[name], **fields})
    adapter = attach(copy.deepcopy(base), strategy, modules_to_train=HEADS.get(name, []))
    parameters = list(adapter.parameters().values())
    steps(adapter.model, parameters, name, lambda step: strategy.after_step(adapter, step, STEPS), until)
    return base, adapter


def theirs(name: str, until: int) -> tuple[nn.Module, PeftModel]:
    base = make(name)
    model: Any = get_peft_model(
        copy.deepcopy(base),
        AdaLoraConfig(init_r=5, target_r=1, lora_alpha=12, tinit=2, tfinal=2, total_step=STEPS, lora_dropout=0.1,
                      target_modules=TARGETS[name], modules_to_save=HEADS.get(name)),
    )  # fmt: skip
    parameters = [p for p in model.parameters() if p.requires_grad]
    steps(model, parameters, name, model.base_model.update_and_allocate, until)
    return base, model


def ranks_in(folder: Path) -> list[int]:
    tensors = load_file(folder / "adapter_model.safetensors")
    return [len(value) for key, value in tensors.items() if key.endswith("lora_E")]


CASES = [(name, "at the end") for name in TARGETS] + [(name, moment) for name in ("bert", "t5") for moment in MOMENTS]


@pytest.mark.parametrize(("name", "moment"), dict.fromkeys(CASES))
def test_hf_peft_computes_the_same_from_our_files_and_so_do_we(name: str, moment: str, tmp_path: Path) -> None:
    base, adapter = ours(name, MOMENTS[moment])
    save_adapter(adapter, tmp_path)
    expected = computed(adapter.model, name)
    assert_near(computed(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path), name), expected)
    again = load_adapter(base, tmp_path)
    assert_near(computed(base, name), expected)
    save_adapter(again, tmp_path / "again")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / file).read_bytes()


@pytest.mark.parametrize(("name", "moment"), dict.fromkeys(CASES))
def test_we_compute_the_same_from_the_files_of_hf_peft(name: str, moment: str, tmp_path: Path) -> None:
    base, model = theirs(name, MOMENTS[moment])
    model.save_pretrained(tmp_path)
    adapter = load_adapter(base, tmp_path)
    assert_near(computed(base, name), computed(model, name))
    assert isinstance(adapter.strategy, AdaLoRA)
    assert sorted(adapter.strategy.final_ranks.values()) == sorted(ranks_in(tmp_path))
    assert (adapter.strategy.init_r, adapter.strategy.alpha, adapter.strategy.dropout) == (5, 12, 0.1)


@pytest.mark.parametrize("name", MODELS)
def test_the_file_of_a_finished_training_holds_exactly_the_budget(name: str, tmp_path: Path) -> None:
    _, adapter = ours(name, STEPS)
    save_adapter(adapter, tmp_path)
    ranks = ranks_in(tmp_path)
    assert sum(ranks) == len(adapter.sites)
    assert 0 in ranks  # a layer without any rank is in the file, too
    pattern = json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {f"base_model.model.{key}" for key in pattern} == {key for key in tensors if key.endswith("lora_E")}
    for key, flags in pattern.items():
        path = f"base_model.model.{key}".removesuffix("E")
        shapes = [tensors[path + matrix].shape for matrix in "AEB"]
        assert (shapes[0][0], shapes[1], shapes[2][1]) == (sum(flags), (sum(flags), 1), sum(flags))
        assert len(flags) == 5


def test_saving_leaves_the_training_and_its_random_numbers_as_they_are(tmp_path: Path) -> None:
    _, adapter = ours("bert", 4)
    before, random = copy.deepcopy(adapter.state()), torch.get_rng_state()
    save_adapter(adapter, tmp_path)
    assert torch.equal(torch.get_rng_state(), random)
    assert before.keys() == adapter.state().keys()
    assert all(torch.equal(value, adapter.state()[key]) for key, value in before.items())


def test_an_adapter_for_chosen_layers_and_another_name(tmp_path: Path) -> None:
    base, adapter = ours("bert", STEPS, layers="last 1", target_modules="attention+mlp")
    save_adapter(adapter, tmp_path)
    assert len(ranks_in(tmp_path)) == 6
    load_adapter(base, tmp_path, "another")
    assert_near(computed(base, "bert"), computed(adapter.model, "bert"))
    model = PeftModel.from_pretrained(make("bert"), tmp_path)
    assert_near(computed(model, "bert"), computed(adapter.model, "bert"))


QUERY = "bert.encoder.layer.0.attention.self.query"
KEY = f"base_model.model.{QUERY}.lora_"
TABLE = "base_model.model.bert.embeddings.word_embeddings"


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"bias": "all"}, {}, "bias is 'all'; AdaLoRA trains no biases here"),
        ({"layer_replication": [[0, 2]]}, {}, "layer_replication"),
        ({"init_r": "five"}, {}, "init_r is 'five'; expected a number"),
        ({"rank_pattern": [1]}, {}, r"rank_pattern is \[1\]; expected a list of true and false"),
        ({"rank_pattern": {f"{QUERY}.lora_E": [True, False]}}, {}, rf"lora_A of {QUERY} has .*need \(1, 32\)"),
        (
            {"init_r": 6},
            {},
            r"lora_B of .*query has shape \(32, 5\); the model and the config need \(32, 6\)",
        ),
        ({}, {f"{KEY}E": None}, f"missing: lora_E of {QUERY}"),
        ({}, {f"{KEY}{matrix}": None for matrix in "AEB"}, f"missing: .* of {QUERY}, which target_modules selects"),
        ({}, {f"{KEY}B": torch.zeros(31, 5)}, r"lora_B of .*query has shape \(31, 5\)"),
        ({}, {"base_model.model.nowhere.lora_A": torch.zeros(5, 3)}, r"unexpected: .*nowhere\.lora_A, for which"),
        ({}, {f"{TABLE}.lora_A": torch.zeros(5, 3)}, "is of the class Embedding, which this method cannot change"),
    ],
)
def test_files_that_do_not_fit_are_refused(
    config: dict[str, Any], tensors: dict[str, Tensor | None], message: str, tmp_path: Path
) -> None:
    base, adapter = ours("bert", 0)
    save_adapter(adapter, tmp_path)
    changed(tmp_path, config, tensors)
    before = computed(base, "bert")
    with pytest.raises(UserError, match=message):
        load_adapter(base, tmp_path)
    assert torch.equal(computed(base, "bert"), before)
    assert not any("deltas" in key for key in base.state_dict())


def test_a_file_without_the_fields_that_have_defaults(tmp_path: Path) -> None:
    base, adapter = ours("bert", 0, init_r=12, target_r=8, alpha=8)
    save_adapter(adapter, tmp_path)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    kept = {field: config[field] for field in ("peft_type", "target_modules", "modules_to_save", "task_type")}
    (tmp_path / "peftlight.json").unlink()
    file.write_text(json.dumps({**kept, "total_step": 10}))
    strategy = load_adapter(base, tmp_path).strategy
    assert isinstance(strategy, AdaLoRA)
    assert (strategy.init_r, strategy.target_r, strategy.alpha, strategy.orthogonality) == (12, 8, 8, 0.5)
