"""What a merge writes is what base and adapter compute; what cannot be merged so is refused, and leaves nothing."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from merging.stirred import HEADS, NEVER, probes_for, scores, stirred
from models import MODELS, make
from peftlight import Adapter, PEFTStrategy, attach, save_adapter
from peftlight.adapters import Adapters
from peftlight.errors import UserError
from peftlight.linear import weight_of
from peftlight.merging import merging
from peftlight.merging.certificate import Certificate
from peftlight.merging.merging import save_merged
from peftlight.merging.plain_model import plain_model
from peftlight.merging.probes import difference
from peftlight.strategies import IA3, BitFit, Full, LoRA, Stack, TrainableTokens
from peftlight.strategies.lora_layers import LinearLoRA
from recipes import RECIPES

pytestmark = pytest.mark.filterwarnings("ignore")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SLOW, OTHERS = pytest.mark.slow, sorted(MODELS.keys() - {"bert", "t5"})


def again(model: nn.Module, folder: Path) -> nn.Module:
    kind: Any = type(model)
    loaded: nn.Module = kind.from_pretrained(folder).eval()
    return loaded


def tied_llama() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=100, tie_word_embeddings=True, **sizes)).eval()


@pytest.mark.parametrize("recipe", sorted(RECIPES.keys() - NEVER))
@pytest.mark.parametrize(
    "name", [name if name in ("bert", "t5") else pytest.param(name, marks=SLOW) for name in MODELS]
)
def test_the_folder_computes_what_base_and_adapter_do(name: str, recipe: str, tmp_path: Path) -> None:
    try:
        adapter = stirred(make(name), RECIPES[recipe](), HEADS.get(name))
    except UserError as error:
        pytest.skip(str(error))
    before, expected = copy.deepcopy(adapter.model.state_dict()), scores(adapter.model, name)
    certificate = save_merged(adapter, tmp_path / "out", probes_for(name))
    assert certificate.difference.relative < 2e-6
    assert certificate.difference.agreement == 1.0
    written = again(adapter.model, tmp_path / "out")
    assert (scores(written, name) - expected).abs().max() <= certificate.difference.largest
    assert not any("deltas" in key for key in load_file(tmp_path / "out" / "model.safetensors"))
    after = adapter.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert torch.equal(scores(adapter.model, name), expected)


@pytest.mark.parametrize("recipe", sorted(NEVER))
def test_what_no_weight_can_hold_is_refused_by_its_name(recipe: str, tmp_path: Path) -> None:
    adapter = stirred(make("bert"), RECIPES[recipe](), ["classifier"])
    name = type(adapter.strategy).__name__ if recipe != "mam" else "PrefixTuning, BottleneckAdapter"
    with pytest.raises(UserError, match=f"one of {name}. It can be used beside its base"):
        save_merged(adapter, tmp_path / "out", probes_for("bert"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "strategies",
    [
        [LoRA(rank=2), IA3()],
        [LoRA(rank=2, use_dora=True), LoRA(rank=4, target_modules=["key"]), BitFit()],
        [BitFit(), LoRA(rank=2, target_modules="all-linear", modules_to_save=["classifier"])],
    ],
    ids=["lora, ia3", "dora, lora, bitfit", "bitfit, lora"],
)
def test_a_stack_merges_if_its_parts_do(strategies: list[PEFTStrategy], tmp_path: Path) -> None:
    adapter = stirred(make("bert"), Stack(strategies))
    assert save_merged(adapter, tmp_path / "out", probes_for("bert")).difference.relative < 2e-6


def test_dora_above_another_delta_is_refused(tmp_path: Path) -> None:
    adapter = stirred(make("bert"), Stack([LoRA(rank=2), LoRA(rank=2, use_dora=True)]))
    with pytest.raises(UserError, match=r"LinearDoRA reads the module's own weight.* Put it first"):
        save_merged(adapter, tmp_path / "out", probes_for("bert"))


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "t5"])
@pytest.mark.parametrize("ends", ["in", "out", "both", "both, differently"])
def test_a_tie_of_which_one_end_changes_is_undone_and_only_then(architecture: str, ends: str, tmp_path: Path) -> None:
    model = tied_llama() if architecture == "llama" else make(architecture)
    table = {"gpt2": "wte", "llama": "embed_tokens", "t5": "decoder.embed_tokens"}[architecture]
    strategy: PEFTStrategy = {
        "in": LoRA(rank=4, target_modules=[table]),
        "out": LoRA(rank=4, target_modules=["lm_head"]),
        "both": TrainableTokens(list(range(2, 60))),
        "both, differently": LoRA(rank=4, target_modules=[table, "lm_head"]),
    }[ends]
    adapter = stirred(model, strategy, by=0.3)
    certificate = save_merged(adapter, tmp_path / "out", probes_for(architecture))
    assert certificate.difference.relative < 2e-6
    assert certificate.effect is not None
    assert certificate.effect.relative > 1e-2
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert ("lm_head.weight" in written) == (ends != "both")
    assert bool(certificate.untied) == (ends != "both")
    told = json.loads((tmp_path / "out" / "config.json").read_text()).get("tie_word_embeddings", True)
    assert told == (ends == "both" or architecture == "t5")
    if architecture == "t5" and ends != "both":
        assert "version 4 would tie it" in certificate.remarks[0]
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_tied_head_trained_whole_stays_tied(tmp_path: Path) -> None:
    adapter = stirred(make("gpt2"), LoRA(rank=2), ["lm_head"])
    certificate = save_merged(adapter, tmp_path / "out", probes_for("gpt2"))
    assert not certificate.untied
    assert certificate.difference.relative < 2e-6


def test_a_head_of_another_size_brings_its_number_of_classes(tmp_path: Path) -> None:
    wide = make("bert")
    wide.classifier = nn.Linear(32, 7)
    trained = stirred(wide, LoRA(rank=2), ["classifier"])
    save_adapter(trained, tmp_path / "adapter")
    adapters = Adapters(make("bert"))
    adapters.load(tmp_path / "adapter", "wide")
    adapters.use("wide")
    certificate = save_merged(adapters["wide"], tmp_path / "out", probes_for("bert"))
    assert certificate.effect is None
    written = again(adapters.model, tmp_path / "out")
    assert written.config.num_labels == 7
    torch.testing.assert_close(scores(written, "bert"), scores(wide, "bert"), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_weight_is_rounded_once(base: torch.dtype, dtype: torch.dtype, tmp_path: Path) -> None:
    adapter = stirred(make("gpt2").to(base), LoRA(rank=4), by=0.1)
    certificate = save_merged(adapter, tmp_path / "out", probes_for("gpt2"), dtype=dtype)
    site = "transformer.h.1.attn.c_attn"
    delta: Any = adapter.sites[site]
    assert isinstance(delta, LinearLoRA)
    exact = adapter.model.get_parameter(f"{site}.weight").double() + delta.scale * (delta.B @ delta.A).T.double()
    written = load_file(tmp_path / "out" / "model.safetensors")[f"{site}.weight"]
    assert written.dtype == dtype
    if dtype == torch.float32:
        assert certificate.lost == 0
        torch.testing.assert_close(written.double(), exact, rtol=1e-6, atol=1e-8)
    else:
        assert (written != exact.to(dtype)).double().mean() < 1e-3  # where float32 falls on the other side of a middle
        assert certificate.lost is not None
        assert 1e-5 < certificate.lost < 1e-1
    assert again(adapter.model, tmp_path / "out").dtype == dtype


def test_what_rounding_costs_is_said(tmp_path: Path) -> None:
    """Changes below the resolution of the number format: rounding moves more than the adapter does."""
    adapter = stirred(make("llama"), IA3(), by=1e-4)
    probes = probes_for("llama")
    certificate = save_merged(adapter, tmp_path / "out", probes, dtype=torch.bfloat16)
    assert certificate.lost is not None
    assert certificate.lost > 1
    assert "Rounding moves the scores by" in certificate.remarks[0]
    assert save_merged(adapter, tmp_path / "exact", probes).remarks == []


def test_a_number_that_the_format_cannot_hold_is_refused(tmp_path: Path) -> None:
    adapter = stirred(make("bert"), LoRA(rank=2), by=3e3)
    with pytest.raises(UserError, match=r"cannot be written in float16, whose largest number is 6.55e\+04"):
        save_merged(adapter, tmp_path / "out", probes_for("bert"), dtype=torch.float16)
    assert not list(tmp_path.iterdir())


def wrong_weight(adapter: Adapter, plain: Any, folder: Path, *rest: Any) -> None:
    """Writes the model, and then one weight a tenth off: the files differ from what is in memory."""
    _write(adapter, plain, folder, *rest)
    tensors = load_file(folder / "model.safetensors")
    tensors["bert.encoder.layer.0.output.dense.weight"] *= 1.1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


_write = merging.write_model


def test_what_is_on_the_disk_is_compared_not_what_is_in_memory(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(merging, "write_model", wrong_weight)
    adapter = stirred(make("bert"), LoRA(rank=2), ["classifier"])
    for dtype in DTYPES:
        message = r"1 of \d+ tensors are not what was written: bert.encoder.layer.0.output.dense.weight"
        with pytest.raises(UserError, match=message):
            save_merged(adapter, tmp_path / "out", probes_for("bert"), dtype=dtype, tolerance=1.0)
        assert not list(tmp_path.iterdir())


def folded_wrongly(share: float, only: str = "") -> Any:
    """`Adapter.folded` with this share of the change, at one site or at all."""

    def folded(adapter: Adapter, site: str) -> Any:
        weight, bias = _folded(adapter, site)
        before = weight_of(adapter.model.get_submodule(site)).to(weight.dtype)
        return (before + share * (weight - before) if site == only or not only else weight), bias

    return folded


_folded = Adapter.folded
SITE = "model.layers.1.self_attn.v_proj"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("share", "only"), [(0.0, ""), (0.0, SITE), (0.9, ""), (2.0, "")])
@pytest.mark.parametrize("by", [0.05, 1e-4])
def test_a_fold_that_loses_something_is_refused_in_each_format(
    dtype: torch.dtype, share: float, only: str, by: float, tmp_path: Path, monkeypatch: Any
) -> None:
    """With a small adapter, whose change rounding hides in the scores, too."""
    adapter = stirred(make("llama").to(dtype), LoRA(rank=2, target_modules="all-linear"), by=by)
    monkeypatch.setattr(Adapter, "folded", folded_wrongly(share, only))
    with pytest.raises(UserError, match=f"not written: .* At {only or 'model.layers'}.* outputs are off by"):
        save_merged(adapter, tmp_path / "out", probes_for("llama"), tolerance=1.0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_that_was_not_put_among_what_is_written_is_refused(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: Any
) -> None:
    adapter = stirred(make("llama").to(dtype), LoRA(rank=2), by=0.3)

    def forgetful(*given: Any) -> Any:
        plain = plain_model(*given)
        plain.state[f"{SITE}.weight"] = adapter.model.get_parameter(f"{SITE}.weight").detach()
        return plain

    monkeypatch.setattr(merging, "plain_model", forgetful)
    with pytest.raises(UserError, match=f"At {SITE} what was to be written is not its folded weight, rounded"):
        save_merged(adapter, tmp_path / "out", probes_for("llama"), tolerance=1.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recipe", ["lora", "dora", "ia3", "hyperlora"])
@pytest.mark.parametrize("by", [1e-7, 0.05])
def test_right_folds_pass_in_each_format_however_small(
    dtype: torch.dtype, recipe: str, by: float, tmp_path: Path
) -> None:
    adapter = stirred(make("llama").to(dtype), RECIPES[recipe](), by=by)
    certificate = save_merged(adapter, tmp_path / "out", probes_for("llama"))
    assert certificate.folding is not None
    assert certificate.folding < 1e-6
    assert json.loads((tmp_path / "out" / "merge.json").read_text())["folding"] == certificate.folding


@pytest.mark.parametrize("amount", [float("nan"), float("inf")])
def test_a_difference_that_is_no_number_does_not_pass(amount: float) -> None:
    good, bad = [torch.ones(2, 3), torch.ones(1, 3)], [torch.ones(2, 3), torch.ones(1, 3)]
    bad[1][0, 1] = amount
    for pair in ((good, bad), (bad, good), (bad, bad)):
        same = pair[0] is pair[1] and amount == float("inf")  # a score of minus infinity forbids a token
        found = Certificate({}, {}, "float32", difference(*pair), None, 1.0, None, None, [], [])
        assert found.passes == same


def test_the_certificate(tmp_path: Path) -> None:
    from hashlib import sha256

    adapter = stirred(make("gpt2"), LoRA(rank=2))
    save_adapter(adapter, tmp_path / "adapter")
    probes = probes_for("gpt2")
    save_merged(adapter, tmp_path / "out", probes, source=tmp_path / "adapter", base=("some/gpt2", "v2"))
    told = json.loads((tmp_path / "out" / "merge.json").read_text())
    record = json.loads((tmp_path / "adapter" / "peftlight.json").read_text())
    assert told["base"]["name"] == "some/gpt2"
    assert told["base"]["revision"] == "v2"
    assert told["base"]["weights"] == record["base"]["weights"] == told["adapter"]["trained_on"]
    assert told["verdict"] == "within the tolerance"
    assert told["versions"]["torch"] == torch.__version__
    files = {path.name for path in (tmp_path / "out").iterdir()} - {"merge.json"}
    assert files == told["files"].keys() == {"config.json", "generation_config.json", "model.safetensors"}
    for folder, hashes in (("out", told["files"]), ("adapter", told["adapter"]["files"])):
        assert hashes == {name: sha256((tmp_path / folder / name).read_bytes()).hexdigest() for name in hashes}
    # The figures, computed another way.
    with torch.no_grad():
        one = [adapter.model(**inputs).logits for inputs in probes.inputs]
        two = [again(adapter.model, tmp_path / "out")(**inputs).logits for inputs in probes.inputs]
    flat, other = (torch.cat([each.flatten() for each in found]) for found in (one, two))
    assert told["difference"]["largest"] == pytest.approx(float((flat - other).abs().max()), abs=1e-9)
    assert told["difference"]["mean"] == pytest.approx(float((flat - other).double().abs().mean()), abs=1e-9)
    assert told["difference"]["scale"] == pytest.approx(float(flat.abs().max()))
    assert told["difference"]["places"] == 5 * 7
    save_merged(adapter, tmp_path / "twin", probes, source=tmp_path / "adapter", base=("some/gpt2", "v2"))
    assert (tmp_path / "twin" / "merge.json").read_bytes() == (tmp_path / "out" / "merge.json").read_bytes()


def test_shards_are_loaded_too(tmp_path: Path) -> None:
    adapter = stirred(make("llama"), LoRA(rank=2))
    certificate = save_merged(adapter, tmp_path / "out", probes_for("llama"), shard_size="40KB")
    assert len([name for name in certificate.files if name.endswith(".safetensors")]) > 1
    assert "model.safetensors.index.json" in certificate.files
    assert {oct(path.stat().st_mode) for path in (tmp_path / "out").iterdir()} == {"0o100644"}
    torch.testing.assert_close(scores(again(adapter.model, tmp_path / "out"), "llama"), scores(adapter.model, "llama"))


def test_the_models_memory_can_be_given_up_before_the_other_is_loaded(tmp_path: Path, monkeypatch: Any) -> None:
    adapter = stirred(make("bert"), LoRA(rank=2))
    monkeypatch.setattr(merging, "_loaded", watched := Watched(merging._loaded))
    save_merged(adapter, tmp_path / "out", probes_for("bert"), free=True)
    assert watched.devices == {"meta"}


class Watched:
    def __init__(self, call: Any) -> None:
        self.call, self.devices = call, set()

    def __call__(self, model: nn.Module, *rest: Any) -> Any:
        self.devices = {parameter.device.type for parameter in model.parameters()}
        return self.call(model, *rest)


@pytest.mark.parametrize("how", ["int8", "config"])
def test_a_quantized_base_is_refused_with_what_to_do(how: str, tmp_path: Path) -> None:
    adapter = stirred(make("bert"), IA3())
    if how == "config":
        adapter.model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    else:
        module = adapter.model.bert.encoder.layer[0].attention.self.key
        module.weight = nn.Parameter(torch.zeros(32, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UserError, match=r"is quantized .*Merge into the model in full precision .*--base NAME"):
        save_merged(adapter, tmp_path / "out", probes_for("bert"))


def test_an_adapter_that_is_off_or_merged_is_refused(tmp_path: Path) -> None:
    adapter = stirred(make("bert"), LoRA(rank=2))
    adapter.disable()
    with pytest.raises(UserError, match="'default' is switched off; enable it before"):
        save_merged(adapter, tmp_path / "out", probes_for("bert"))
    adapter.enable()
    adapter.merge()
    with pytest.raises(UserError, match="'default' is merged already; unmerge it before"):
        save_merged(adapter, tmp_path / "out", probes_for("bert"))


def test_another_adapter_that_is_on_is_refused(tmp_path: Path) -> None:
    """It is no part of what is written."""
    model = make("bert")
    first = stirred(model, LoRA(rank=2))
    other = attach(model, LoRA(rank=2, target_modules=["key"]), "other")
    with pytest.raises(UserError, match="other is on too; what is merged is 'default' alone"):
        save_merged(first, tmp_path / "out", probes_for("bert"))
    other.disable()
    save_merged(first, tmp_path / "out", probes_for("bert"))


def test_a_whole_model_trained_in_place_is_written(tmp_path: Path) -> None:
    adapter = stirred(make("bert"), Full())
    certificate = save_merged(adapter, tmp_path / "out", probes_for("bert"))
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(written[name], value) for name, value in adapter.parameters().items())
    assert certificate.difference.relative < 1e-6  # where they lie in the memory can change the order of a sum
    assert certificate.effect is None


def test_nothing_that_is_there_is_lost(tmp_path: Path) -> None:
    adapter, probes = stirred(make("bert"), LoRA(rank=2)), probes_for("bert")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="file is a file"):
        save_merged(adapter, tmp_path / "file", probes)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"mine is not empty \(notes.txt\)"):
        save_merged(adapter, tmp_path / "mine", probes)
    with pytest.raises(UserError, match=r"mine is not replaced: it has no merge.json"):
        save_merged(adapter, tmp_path / "mine", probes, overwrite=True)
    (tmp_path / "empty").mkdir()
    save_merged(adapter, tmp_path / "empty", probes)
    before = {path.name: path.read_bytes() for path in (tmp_path / "empty").iterdir()}
    adapter.parameters()["bert.encoder.layer.0.attention.self.query.deltas.default.B"].data.add_(1.0)
    with pytest.raises(UserError, match="does not compute"):
        save_merged(adapter, tmp_path / "empty", probes, overwrite=True, tolerance=-1.0)
    assert {path.name: path.read_bytes() for path in (tmp_path / "empty").iterdir()} == before
    save_merged(adapter, tmp_path / "empty", probes, overwrite=True)
    after = {path.name: path.read_bytes() for path in (tmp_path / "empty").iterdir()}
    assert after.keys() == before.keys()
    assert after["model.safetensors"] != before["model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "mine"]


CHILD = """
import os, resource, signal, sys
from pathlib import Path
sys.path[:0] = [{tests!r}]
from merging.test_merging import *
out, how = Path(sys.argv[1]), sys.argv[2]
if how == "full":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
else:
    merging.write_folder.__globals__["_put_in_place"] = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
try:
    save_merged(stirred(make("bert"), LoRA(rank=2)), out, probes_for("bert"), overwrite=True)
except UserError as error:
    sys.exit(str(error))
"""


@pytest.mark.parametrize("there", [True, pytest.param(False, marks=SLOW)])
@pytest.mark.parametrize("how", ["full", "killed"])
def test_a_full_disk_and_a_killed_process_leave_what_was_there(how: str, there: bool, tmp_path: Path) -> None:
    """The limit on a file's size stands in for a disk without room."""
    out = tmp_path / "out"
    if there:
        save_merged(stirred(make("bert"), LoRA(rank=2)), out, probes_for("bert"))
    before = {path.name: path.read_bytes() for path in out.iterdir()} if there else None
    code = CHILD.format(tests=str(Path(__file__).parents[1]))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(out), how],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if how == "full":
        assert done.returncode == 1, done.stderr[-2000:]
        assert f"No room left to write {out}" in done.stderr
        assert [path for path in tmp_path.iterdir() if path != out] == []
    else:
        assert done.returncode == -9, done.stderr[-2000:]
    assert ({path.name: path.read_bytes() for path in out.iterdir()} if out.exists() else None) == before
