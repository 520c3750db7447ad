"""Adapters through files: ours read by HF PEFT, HF PEFT's read by us, and our own format."""

import copy
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from interop.exchange import HEADS, TASKS, computed, heads, quietly, saved, stir, theirs_is_read_by_us
from models import MODELS, inputs_for, make
from peftlight import PEFTStrategy, attach, load_adapter, save_adapter
from peftlight.delta import Base, Delta
from peftlight.errors import UserError
from peftlight.strategies import BitFit, BottleneckAdapter, Full, LayerNormTuning, LoRA, Stack
from strategies.against_peft import assert_near

pytestmark = pytest.mark.filterwarnings("ignore")
ALL = [*MODELS, "llama_classifier"]
FIRST = {"bert": "query", "roberta": "query", "gpt2": "c_attn", "t5": "q"}

RECIPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "all linear layers": {"target_modules": "all-linear"},
    "patterns": {"target_modules": "attention", "rank_pattern": {"FIRST": 2}, "alpha_pattern": {"FIRST": 3.5}},
    "patterns whose order counts": {
        "target_modules": "attention",
        "rank_pattern": {r".*\.1\..*FIRST": 2, r".*FIRST": 6, r".*": 3},
    },
    "one layer": {"layers": "last 1"},
    "all biases": {"bias": "all", "dropout": 0.3},
    "biases of the adapted": {"bias": "lora_only"},
    "rslora": {"use_rslora": True, "rank_pattern": {"FIRST": 2}, "alpha_pattern": {"FIRST": 3.5}},
    "dora": {"use_dora": True, "target_modules": "all-linear", "dropout": 0.3},
    "dora and rslora": {"use_dora": True, "use_rslora": True, "bias": "lora_only"},
    "pissa": {"init_lora_weights": "pissa", "rank_pattern": {"FIRST": 2}, "dropout": 0.3, "bias": "lora_only"},
    "pissa and rslora": {"init_lora_weights": "pissa", "use_rslora": True, "alpha_pattern": {"FIRST": 3.5}},
    "olora": {"init_lora_weights": "olora", "target_modules": "all-linear"},
}


def recipe(variant: str, name: str) -> LoRA:
    first = FIRST.get(name, "q_proj")
    fields = {
        field: {key.replace("FIRST", first): number for key, number in value.items()} if "pattern" in field else value
        for field, value in RECIPES[variant].items()
    }
    return LoRA(**{"rank": 4, "alpha": 12, **fields})


@pytest.mark.parametrize("variant", RECIPES)
@pytest.mark.parametrize("name", ALL)
def test_peft_and_we_read_what_we_write(name: str, variant: str, tmp_path: Path) -> None:
    base, adapter = saved(name, recipe(variant, name), tmp_path, heads(name))
    expected = computed(adapter.model, inputs_for(name))
    again = load_adapter(copy.deepcopy(base), tmp_path)
    assert torch.equal(computed(again.model, inputs_for(name)), expected)
    assert again.parameters().keys() == adapter.parameters().keys()
    assert all(parameter.requires_grad for parameter in again.parameters().values())
    assert_near(computed(quietly(base, tmp_path), inputs_for(name)), expected)
    # Read and written again, the files are the same.
    save_adapter(again, tmp_path / "again")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / file).read_bytes()


@pytest.mark.parametrize("stacked", [False, True])
def test_twice_a_large_rank_is_read_again(stacked: bool, tmp_path: Path) -> None:
    """A rank above the layer's width is refused of a recipe, and is right for a PiSSA that was saved."""
    strategy: PEFTStrategy = LoRA(rank=20, init_lora_weights="pissa")
    strategy = Stack([strategy, BitFit()]) if stacked else strategy
    base, adapter = saved("bert", strategy, tmp_path, ["classifier"])
    expected = computed(adapter.model, inputs_for("bert"))
    again = load_adapter(copy.deepcopy(base), tmp_path)
    assert torch.equal(computed(again.model, inputs_for("bert")), expected)
    if not stacked:
        assert_near(computed(quietly(base, tmp_path), inputs_for("bert")), expected)


@pytest.mark.parametrize("variant", ["plain", "all biases"])
@pytest.mark.parametrize("name", ["bert", "roberta", "vit", "llama_classifier"])
def test_a_head_that_is_not_trained_stays_so(name: str, variant: str, tmp_path: Path) -> None:
    """HF PEFT wants a copy of it in the file all the same."""
    base, adapter = saved(name, recipe(variant, name), tmp_path, [])
    expected = computed(adapter.model, inputs_for(name))
    again = load_adapter(copy.deepcopy(base), tmp_path)
    assert again.parameters().keys() == adapter.parameters().keys()
    assert torch.equal(computed(again.model, inputs_for(name)), expected)
    assert_near(computed(quietly(base, tmp_path), inputs_for(name)), expected)


@pytest.mark.parametrize("name", ["bert", "llama_classifier"])
def test_an_untrained_head_of_another_base_comes_with_the_adapter(name: str, tmp_path: Path) -> None:
    """A new head is random in each base; without the copy the adapter would compute something else."""
    base, adapter = saved(name, LoRA(rank=4), tmp_path, [])
    stir(base.get_submodule(HEADS[name][0]).parameters())
    again = load_adapter(base, tmp_path)
    assert torch.equal(computed(base, inputs_for(name)), computed(adapter.model, inputs_for(name)))
    assert again.trained == heads(name)


THEIRS: dict[str, dict[str, Any]] = {
    "plain": {},
    "patterns": {"rank_pattern": {"FIRST": 2, "nowhere": 3}, "alpha_pattern": {"FIRST": 5}},
    "one layer": {"layers_to_transform": [1]},
    "one layer of a pattern": {"layers_to_transform": 0, "layers_pattern": ["layer", "layers", "h", "block"]},
    "a regex": {"target_modules": r".*\.[01]\..*FIRST"},
    "excluded": {"exclude_modules": r".*\.1\..*"},
    "all linear layers": {"target_modules": "all-linear"},
    "all biases": {"bias": "all"},
    "biases of the adapted": {"bias": "lora_only"},
    "gaussian start": {"init_lora_weights": "gaussian"},
    "rslora": {"use_rslora": True, "rank_pattern": {"FIRST": 2}},
    "dora": {"use_dora": True, "target_modules": "all-linear"},
    "dora and rslora": {"use_dora": True, "use_rslora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa and rslora": {"init_lora_weights": "pissa", "use_rslora": True, "alpha_pattern": {"FIRST": 5}},
    "olora": {"init_lora_weights": "olora"},
    "a rank above the layer's width": {"r": 50},
}


def their_config(variant: str, name: str) -> LoraConfig:
    first = FIRST.get(name, "q_proj")
    fields = json.loads(json.dumps(THEIRS[variant]).replace("FIRST", first))
    targets = {"vit": ["q_proj", "v_proj"]}.get(name)
    if name == "vit":
        fields |= {"modules_to_save": ["classifier"]}
    return LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": targets, "task_type": TASKS.get(name), **fields})


@pytest.mark.parametrize(
    ("variant", "name"),
    [(variant, name) for variant in THEIRS for name in ALL if (variant, name) != ("olora", "gpt2")],  # HF PEFT fails
)
def test_we_read_what_peft_writes(name: str, variant: str, tmp_path: Path) -> None:
    base = make(name)
    theirs = get_peft_model(copy.deepcopy(base), their_config(variant, name)).eval()
    stir(p for key, p in theirs.named_parameters() if p.requires_grad and "original_module" not in key)
    theirs.save_pretrained(tmp_path)
    before = computed(base, inputs_for(name))
    adapter = load_adapter(base, tmp_path)
    expected = computed(theirs, inputs_for(name))
    assert_near(computed(base, inputs_for(name)), expected)
    ours = sum(p.numel() for p in adapter.parameters().values())
    odd = [p for key, p in theirs.named_parameters() if p.requires_grad and "original_module" not in key]
    assert ours == sum(p.numel() for p in odd)
    adapter.remove()
    assert torch.equal(computed(base, inputs_for(name)), before)


def test_keys_without_the_prefix(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    base, adapter = saved("bert", LoRA(rank=4), tmp_path, ["classifier"])
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file(
        {k.removeprefix("base_model.model."): v for k, v in tensors.items()}, tmp_path / "adapter_model.safetensors"
    )
    (tmp_path / "peftlight.json").unlink()
    load_adapter(base, tmp_path)
    assert torch.equal(computed(base, inputs_for("bert")), computed(adapter.model, inputs_for("bert")))


def test_modules_to_save_listed_twice_and_a_head_that_is_nowhere(tmp_path: Path) -> None:
    base, adapter = saved("bert", LoRA(rank=4), tmp_path, ["classifier"])
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    config["modules_to_save"] = ["classifier", "score", "classifier", "score"]
    path.write_text(json.dumps(config))
    load_adapter(base, tmp_path)
    assert torch.equal(computed(base, inputs_for("bert")), computed(adapter.model, inputs_for("bert")))


TABLES = {
    "bert": "word_embeddings", "roberta": "word_embeddings", "llama": "embed_tokens", "gpt2": "wte", "t5": "shared",
    "llama_classifier": "embed_tokens",
}  # fmt: skip


@pytest.mark.parametrize(("name", "table"), TABLES.items())
@pytest.mark.parametrize("dora", [False, True])
def test_embeddings_both_ways(name: str, table: str, dora: bool, tmp_path: Path) -> None:
    """For `embed_tokens` HF PEFT writes the base's own table too; equal to ours, it is no news."""
    strategy = LoRA(rank=4, target_modules=[table, FIRST.get(name, "q_proj")], use_dora=dora)
    base, adapter = saved(name, strategy, tmp_path / "ours", heads(name))
    expected = computed(adapter.model, inputs_for(name))
    theirs = quietly(copy.deepcopy(base), tmp_path / "ours")
    assert_near(computed(theirs, inputs_for(name)), expected)
    theirs.save_pretrained(tmp_path / "theirs")
    assert torch.equal(computed(load_adapter(base, tmp_path / "theirs").model, inputs_for(name)), expected)


@pytest.mark.parametrize(("name", "table"), TABLES.items())
def test_an_embedding_trained_whole_that_we_write(name: str, table: str, tmp_path: Path) -> None:
    """With a head beside it; what is tied to the embedding is written too."""
    strategy = LoRA(rank=4, target_modules="attention", modules_to_save=[table, *heads(name)])
    base, adapter = saved(name, strategy, tmp_path, [])
    expected = computed(adapter.model, inputs_for(name))
    assert torch.equal(computed(load_adapter(copy.deepcopy(base), tmp_path).model, inputs_for(name)), expected)
    assert_near(computed(quietly(base, tmp_path), inputs_for(name)), expected)


@pytest.mark.parametrize("name", ["bert", "roberta", "llama", "llama_classifier"])
def test_an_embedding_trained_whole_that_peft_writes(name: str, tmp_path: Path) -> None:
    modules, targets = [TABLES[name], *heads(name)], [FIRST.get(name, "q_proj")]
    config = LoraConfig(r=4, modules_to_save=modules, task_type=TASKS[name], target_modules=targets)
    theirs_is_read_by_us(name, config, tmp_path)


def test_a_convolution_of_a_vit_that_peft_writes(tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["projection", "q_proj"], modules_to_save=["classifier"], use_dora=True)
    strategy = theirs_is_read_by_us("vit", config, tmp_path).strategy
    assert isinstance(strategy, LoRA)
    assert strategy.target_modules == ["projection", "q_proj"]


class ConvNet(nn.Module):
    """Convolutions, and a head with running statistics."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.image = nn.Conv2d(4, 8, (3, 2), stride=2, padding=1, groups=groups)
        self.line = nn.Conv1d(8, 6, 3, padding=1)
        self.head = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.line(self.image(x).relu().mean(2)).mean(2))


@pytest.mark.parametrize("dora", [False, True])
def test_convolutions_both_ways(dora: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, x = ConvNet(1 if dora else 2).eval(), torch.randn(5, 4, 9, 8)
    strategy = LoRA(rank=4, target_modules=["image", "line"], modules_to_save=["head"], use_dora=dora)
    adapter = attach(copy.deepcopy(base), strategy)
    stir(adapter.parameters().values())
    adapter.model.train()(x)
    expected = computed(adapter.model.eval(), x)
    save_adapter(adapter, tmp_path / "ours")
    theirs = quietly(copy.deepcopy(base), tmp_path / "ours")
    assert_near(computed(theirs.eval(), x), expected)
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        again = load_adapter(copy.deepcopy(base), tmp_path / folder)
        assert torch.equal(computed(again.model, x), expected)


def test_a_tied_head_is_written_with_what_it_is_tied_to(tmp_path: Path) -> None:
    base, adapter = saved("gpt2", LoRA(rank=4), tmp_path, ["lm_head"])
    expected = computed(adapter.model, inputs_for("gpt2"))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == [
        "lm_head",
        "transformer.wte",
    ]
    again = load_adapter(copy.deepcopy(base), tmp_path)
    assert torch.equal(computed(again.model, inputs_for("gpt2")), expected)
    assert again.model.lm_head.weight is again.model.transformer.wte.weight
    assert_near(computed(quietly(base, tmp_path), inputs_for("gpt2")), expected)


def test_a_head_that_peft_untied_is_refused(tmp_path: Path) -> None:
    base = make("gpt2")
    theirs = get_peft_model(copy.deepcopy(base), LoraConfig(modules_to_save=["lm_head"]))
    stir(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"lm_head.weight is trained and transformer.wte.weight is not, but they are one tensor"
    ):
        load_adapter(base, tmp_path)


def test_an_adapted_head_needs_no_task(tmp_path: Path) -> None:
    """HF PEFT would train it whole beside the adapter if it knew the task."""
    base, adapter = saved("bert", LoRA(rank=3, target_modules=["query", "classifier"]), tmp_path, [])
    expected = computed(adapter.model, inputs_for("bert"))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] is None
    assert_near(computed(quietly(copy.deepcopy(base), tmp_path), inputs_for("bert")), expected)
    assert torch.equal(computed(load_adapter(base, tmp_path).model, inputs_for("bert")), expected)


def test_the_config(tmp_path: Path) -> None:
    base = make("llama")
    base.config.name_or_path = "some/llama"
    save_adapter(attach(base, LoRA(rank=4, alpha=6.0, dropout=0.1)), tmp_path)
    text = (tmp_path / "adapter_config.json").read_text()
    config = json.loads(text)
    expected = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "some/llama", "r": 4,
        "lora_alpha": 6, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {},
        "alpha_pattern": {}, "bias": "none", "modules_to_save": None, "layers_to_transform": None,
        "inference_mode": True, "peft_version": "0.21.2",
    }  # fmt: skip
    assert {key: config[key] for key in expected} == expected
    assert '"lora_alpha": 6,' in text
    assert text == json.dumps(config, indent=2, sort_keys=True) + "\n"


def test_targets_are_short_where_that_is_exact(tmp_path: Path) -> None:
    def targets(name: str, **fields: Any) -> Any:
        save_adapter(attach(make(name), LoRA(rank=2, **fields)), tmp_path)
        return json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]

    assert targets("bert") == ["query", "value"]
    assert targets("bert", layers="first 1", target_modules=["query"]) == ["bert.encoder.layer.0.attention.self.query"]
    assert targets("roberta", target_modules=["dense"], exclude_modules=["classifier"]) == ["dense"]
    assert len(targets("vit", target_modules=["q_proj", "fc1"])) == 2


def test_a_path_that_is_the_end_of_another(tmp_path: Path) -> None:
    """A list cannot select the outer `fc` alone; a regular expression can."""
    base = nn.ModuleDict({"fc": nn.Linear(4, 4), "block": nn.ModuleDict({"fc": nn.Linear(4, 4)})})
    adapter = attach(copy.deepcopy(base), LoRA(rank=2, target_modules="^fc$"))
    stir(adapter.parameters().values())
    save_adapter(adapter, tmp_path)
    again = load_adapter(copy.deepcopy(base), tmp_path)
    assert list(again.sites) == ["fc"]
    assert list(quietly(base, tmp_path).base_model.targeted_module_names) == ["fc"]


@pytest.mark.parametrize(
    ("strategy", "name"),
    [(BottleneckAdapter, "bert"), (BottleneckAdapter, "gpt2"), (Full, "bert"), (Full, "gpt2"), (Full, "llama")],
)
def test_our_own_format(name: str, strategy: type[PEFTStrategy], tmp_path: Path) -> None:
    base, adapter = saved(name, strategy(), tmp_path, heads(name))
    expected = computed(adapter.model, inputs_for(name))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == f"PEFTLIGHT_{strategy.__name__.upper()}"
    again = load_adapter(copy.deepcopy(base), tmp_path, "other")
    assert torch.equal(computed(again.model, inputs_for(name)), expected)
    assert isinstance(again.strategy, strategy)
    assert set(again.trained) == set(adapter.trained)
    with pytest.raises((KeyError, ValueError)):
        PeftModel.from_pretrained(base, tmp_path)


@dataclass
class Scaled(PEFTStrategy):
    """A strategy of a user's own."""

    start: float = 1.0
    norms: tuple[str, ...] = ("pooler",)

    def deltas(self, model: nn.Module) -> list[tuple[str, Delta]]:
        return [("classifier", _Scale(self.start))]

    def train(self, model: nn.Module) -> list[str]:
        return ["bert.pooler"]


class _Scale(Delta):
    def __init__(self, start: float) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.tensor(start))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, base: Base, x: Tensor) -> Tensor:
        y: Tensor = base(x)
        return y * self.s


def test_a_strategy_of_the_users_own(tmp_path: Path) -> None:
    base, adapter = saved("bert", Scaled(2.0), tmp_path, [])
    expected = computed(adapter.model, inputs_for("bert"))
    again = load_adapter(base, tmp_path, "mine")
    assert torch.equal(computed(base, inputs_for("bert")), expected)
    assert isinstance(again.strategy, Scaled)
    assert again.strategy.start == 2.0
    assert "classifier.deltas.mine.calls" in again.state()


def test_the_same_adapter_gives_the_same_bytes(tmp_path: Path) -> None:
    for strategy in (LoRA(rank=4, bias="all", modules_to_save=["pooler", "classifier"]), BitFit()):
        adapter = attach(make("bert"), strategy)
        for folder in ("one", "two", "two"):
            save_adapter(adapter, tmp_path / folder)
        files = sorted(path.name for path in (tmp_path / "one").iterdir())
        assert files == ["adapter_config.json", "adapter_model.safetensors", "peftlight.json"]
        for file in files:
            assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
        shutil.rmtree(tmp_path / "one")


def test_files_can_be_read_by_everyone_who_may_read_the_others(tmp_path: Path) -> None:
    save_adapter(attach(make("bert"), LoRA(rank=4)), tmp_path)
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_the_metadata(tmp_path: Path) -> None:
    save_adapter(attach(make("bert"), LoRA(rank=4)), tmp_path)
    origin = json.loads((tmp_path / "peftlight.json").read_text())
    assert origin["format"] == 2
    assert origin["strategy"]["class_path"] == "peftlight.strategies.lora.LoRA"
    assert origin["versions"].keys() == {"peftlight", "torch", "transformers"}


def test_a_float32_head_keeps_its_values_in_a_half_precision_base(tmp_path: Path) -> None:
    _, adapter = saved("bert", LoRA(rank=4), tmp_path, ["classifier"])
    base = make("bert").bfloat16()
    before = {key: value.clone() for key, value in base.state_dict().items()}
    again = load_adapter(base, tmp_path)
    for key, parameter in adapter.parameters().items():
        assert torch.equal(again.parameters()[key], parameter)
    assert {p.dtype for p in again.parameters().values()} == {torch.float32}
    again.remove()
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())
    assert base.classifier.weight.dtype == torch.bfloat16


def test_saved_tensors_keep_their_dtype(tmp_path: Path) -> None:
    adapter = attach(make("bert").bfloat16(), LayerNormTuning())
    save_adapter(adapter, tmp_path)
    assert {t.dtype for t in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.bfloat16}


def test_two_adapters_from_files(tmp_path: Path) -> None:
    base, _ = saved("bert", LoRA(rank=4), tmp_path / "first", [])
    saved("bert", LoRA(rank=2, target_modules=["query", "key"]), tmp_path / "second", [])
    load_adapter(base, tmp_path / "first", "first")
    alone = computed(base, inputs_for("bert"))
    other = load_adapter(base, tmp_path / "second", "second")
    with other.disabled():
        assert torch.equal(computed(base, inputs_for("bert")), alone)
    assert not torch.equal(computed(base, inputs_for("bert")), alone)
    save_adapter(other, tmp_path / "again")
    one, two = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("second", "again"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
