"""`peftlight combine`: a folder with what the weighted sum of the given ones computes."""

import json
from pathlib import Path

import pytest
import torch

from commands.trained import COMMAND_LINE, fitted, gpt2_in
from peftlight import Adapter, attach, load_adapter, save_adapter
from peftlight.cli import main
from peftlight.interop import read_record
from peftlight.pretrained import Source
from peftlight.strategies import IA3, LoRA, PromptTuning
from peftlight.strategy import PEFTStrategy
from strategies.small import stirred

pytestmark = COMMAND_LINE
INPUTS = {"input_ids": torch.tensor([[5, 6, 7, 8]])}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gpt2_in(tmp_path_factory.mktemp("models") / "gpt2")


def on(base: Path, strategy: PEFTStrategy, seed: int) -> Adapter:
    model, _ = Source(str(base)).load_model("AutoModelForCausalLM")
    torch.manual_seed(seed)
    return stirred(attach(model.eval(), strategy), 0.1)


def saved(adapter: Adapter, base: Path, folder: Path) -> str:
    record = {"base": {"name": str(base), "auto_class": "AutoModelForCausalLM"}, "task": "CausalLM"}
    save_adapter(adapter, folder, record)
    return str(folder)


def computed(adapter: Adapter) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = adapter.model(**INPUTS).logits
    return logits


def read(base: Path, folder: Path) -> Adapter:
    model, _ = Source(str(base)).load_model("AutoModelForCausalLM")
    return load_adapter(model.eval(), folder)


@pytest.fixture
def two(base: Path, tmp_path: Path) -> list[str]:
    strategies = [LoRA(rank=2), LoRA(rank=3, target_modules=["c_attn", "c_fc"])]
    return [saved(on(base, strategy, seed), base, tmp_path / f"of{seed}") for seed, strategy in enumerate(strategies)]


def test_the_folder_computes_the_weighted_sum(
    base: Path, two: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["combine", "--traceback", f"{two[0]}:0.25", f"second={two[1]}:-2", str(out)]) == 0
    said = capsys.readouterr().out
    assert "0.25 of0 + -2 second" in said
    assert f"peftlight inspect {out}" in said
    one, other = (read(base, Path(folder)) for folder in two)
    model, _ = Source(str(base)).load_model("AutoModelForCausalLM")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for weight, adapter in ((0.25, one), (-2.0, other)):
        adapter.merge()
        merged = dict(adapter.model.named_parameters())
        for name, parameter in model.named_parameters():
            parameter.data += weight * (merged[name].detach() - before[name])
    with torch.no_grad():
        expected = model.eval()(**INPUTS).logits
    torch.testing.assert_close(computed(read(base, out)), expected, rtol=1e-5, atol=1e-5)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    record = read_record(out)
    assert (record.base.name, record.base.auto_class, record.task) == (str(base), "AutoModelForCausalLM", "CausalLM")
    made_of = json.loads((out / "peftlight.json").read_text())["combined"]
    assert made_of["method"] == "sum"
    assert [(each["name"], each["weight"]) for each in made_of["adapters"]] == [("of0", 0.25), ("second", -2.0)]


@pytest.mark.parametrize("method", ["svd", "ties", "dare"])
def test_the_other_methods_say_what_their_rank_loses(
    two: list[str], tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank, name in (("2", "small"), ("32", "large"), ("32", "again")):
        assert main(["combine", *two, str(tmp_path / name), "--method", method, "--rank", rank, "--seed=3"]) == 0
    tensors = [tmp_path / name / "adapter_model.safetensors" for name in ("small", "large", "again")]
    assert tensors[1].read_bytes() == tensors[2].read_bytes() != tensors[0].read_bytes()
    row = next(line for line in capsys.readouterr().out.splitlines() if "c_attn" in line)
    assert 0 < float(row.split()[3]) < 1


def test_a_forgotten_folder_overwrites_nothing(two: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    before = Path(two[1], "adapter_model.safetensors").read_bytes()
    assert main(["combine", *two]) == 2
    assert "the last word, is the new adapter's folder; it is there and not empty" in capsys.readouterr().err
    assert Path(two[1], "adapter_model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("word", "options", "message"),
    [
        ("{}:half", [], "ends in 'half'; expected a folder and, after a colon, a finite weight"),
        ("{}:nan", [], "expected a folder and, after a colon, a finite weight"),
        ("{}", ["--rank=3"], "rank is a number from 1 up, for svd, ties and dare"),
        ("{}", ["--method=sun"], "--method is 'sun'; expected one of sum, svd, ties, dare"),
        ("{}", ["--heads_from=x"], "Heads are trained by -"),
        ("{}x", [], "There is no such folder"),
    ],
)
def test_wrong_words_are_refused(
    two: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], word: str, options: list[str], message: str
) -> None:
    assert main(["combine", word.format(two[0]), f"b={two[1]}", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_no_change_of_weights_is_refused(
    base: Path, two: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = saved(on(base, PromptTuning(num_virtual_tokens=2), 1), base, tmp_path / "prompt")
    scales = saved(on(base, IA3(), 2), base, tmp_path / "scales")
    assert main(["combine", two[0], prompt, str(tmp_path / "out")]) == 2
    assert "'prompt' (PromptTuning) cannot be combined" in capsys.readouterr().err
    assert main(["combine", two[0], scales, str(tmp_path / "out")]) == 2
    assert "method svd" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_trained_classifiers_are_combined_with_the_head_of_one(encoder: Path, tmp_path: Path) -> None:
    runs = [fitted(tmp_path / "runs", encoder, "lora", data__source="sample:sentiment", seed_everything=seed)
            for seed in (1, 2)]  # fmt: skip
    words = [f"{name}={run}:0.5" for name, run in zip("ab", runs, strict=True)]
    out = tmp_path / "out"
    assert main(["combine", *words, str(out)]) == 2
    assert main(["combine", "--traceback", *words, str(out), "--heads_from=b"]) == 0
    one, other = (read_record(folder) for folder in (out, runs[1]))
    assert (one.label_names, one.task) == (other.label_names, "SequenceClassification")
    assert main(["evaluate", "--traceback", str(out), f"--config={runs[1] / 'config.yaml'}"]) == 0
