"""QLoRA by one overlay: through the command line, on real files, with checkpoints, two processes and a merge."""

import json
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from models import make
from peftlight import load_adapter
from peftlight.callbacks import Quantize
from peftlight.cli import main
from peftlight.errors import UserError
from peftlight.interop import read_record
from peftlight.linear import is_quantized
from peftlight.pretrained import Source
from peftlight.strategies import BitFit, BottleneckAdapter, LoRA
from peftlight.tasks import CausalLM, SequenceClassification
from processes.ranks import Ranks
from recipes import CONFIGS, RECIPES
from tasks.small import QUIET, batches, class_rows, constant, loader, quiet_trainer

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore")]
OVERLAY = ["--config", str(CONFIGS / "4bit.yaml")]


def fit(tmp_path: Path, base: Path, *flags: str, config: str = "lora.yaml") -> Path:
    options = [f"--model.base_model={base}", f"--trainer.default_root_dir={tmp_path / 'runs'}",
               "--trainer.max_epochs=1", "--trainer.limit_train_batches=3", "--trainer.max_steps=-1",
               "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]  # fmt: skip
    assert main(["fit", "--traceback", "--config", str(CONFIGS / config), *flags, *options]) == 0
    (run,) = (tmp_path / "runs").iterdir()
    return run


SENTIMENT = ["--data.source=sample:sentiment", "--data.batch_size=4"]


def test_the_overlay_makes_any_method_a_quantized_one(
    tmp_path: Path, encoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fit(tmp_path, encoder, *OVERLAY, *SENTIMENT, config="ia3.yaml")
    assert "the base in 4 bits (nf4 with double quantization, blocks of 64): " in capsys.readouterr().out
    record = read_record(run).base
    assert record.quantization == {
        "bits": 4, "quant_type": "nf4", "double_quant": True, "block_size": 64, "compute_dtype": "auto", "keep": [],
    }  # fmt: skip
    assert record.dtype == "uint8"
    audit = json.loads((run / "run.json").read_text())["audit"]
    assert audit["base_checksum"]  # a fit whose base moved ends in an error before this is written
    assert audit["trained"]
    assert all(tensor["had_gradient"] and tensor["moved"] for tensor in audit["trained"])
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["quantization"] == record.quantization
    assert all(value.is_floating_point() for value in checkpoint["state_dict"].values())
    assert not any("absmax" in key for key in checkpoint["state_dict"])


def test_callbacks_of_other_files_are_kept(tmp_path: Path, encoder: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("trainer:\n  callbacks+:\n    - class_path: lightning.pytorch.callbacks.LearningRateMonitor\n")
    run = fit(tmp_path, encoder, *OVERLAY, "--config", str(mine), *SENTIMENT)
    config = (run / "config.yaml").read_text()
    assert "Quantize" in config
    assert "LearningRateMonitor" in config


def test_callbacks_that_would_replace_it_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("trainer:\n  callbacks:\n    - class_path: lightning.pytorch.callbacks.LearningRateMonitor\n")
    assert main(["fit", "--config", str(CONFIGS / "lora.yaml"), *OVERLAY, "--config", str(mine)]) == 2
    error = capsys.readouterr().err
    assert f"{mine}:2: trainer.callbacks would replace the callbacks of {CONFIGS / '4bit.yaml'}:" in error
    assert "write callbacks+ in place of callbacks" in error


def test_the_run_is_evaluated_on_the_base_that_it_was_trained_on(
    tmp_path: Path, encoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fit(tmp_path, encoder, *OVERLAY, *SENTIMENT)
    metrics = json.loads((run / "run.json").read_text())["metrics"]
    assert main(["evaluate", str(run), "--json", str(tmp_path / "found.json")]) == 0
    assert str(metrics["val_loss"])[:7] in (tmp_path / "found.json").read_text()
    again = ["--ckpt_path", str(run / "checkpoints" / "last.ckpt"), f"--trainer.default_root_dir={tmp_path / 'again'}"]
    assert main(["validate", "--config", str(run / "config.yaml"), *again]) == 0
    (validated,) = (tmp_path / "again").iterdir()
    assert json.loads((validated / "run.json").read_text())["metrics"]["val_loss"] == metrics["val_loss"]


def test_merged_it_goes_into_the_full_base_and_says_how_far_that_is(tmp_path: Path, decoder: Path) -> None:
    flags = ["--config", str(CONFIGS / "data" / "alpaca.yaml"), *OVERLAY, "--data.source=sample:instructions"]
    run = fit(tmp_path, decoder, *flags, "--data.batch_size=2")
    assert main(["merge", str(run), str(tmp_path / "merged")]) == 0
    certificate = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert certificate["difference"]["relative"] < 1e-5
    assert certificate["quantized"]["largest"] > 100 * certificate["difference"]["largest"]
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())


def test_the_papers_recipe_runs_at_small_size(tmp_path: Path, decoder: Path) -> None:
    small = ["--data.source=sample:instructions", "--model.strategy.rank=4", "--trainer.accumulate_grad_batches=1"]
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        run = fit(tmp_path, decoder, *small, config="qlora.yaml")
    assert read_record(run).base.quantization is not None
    assert "PagedAdamW32bit is paged only beside a CUDA card" in (run / "log.txt").read_text()


@pytest.mark.parametrize("optimizer", ["AdamW8bit", "PagedAdamW8bit", "PagedAdamW32bit"])
def test_optimizers_of_bitsandbytes_are_chosen_by_name(tmp_path: Path, encoder: Path, optimizer: str) -> None:
    run = fit(tmp_path, encoder, *SENTIMENT, f"--optimizer=bitsandbytes.optim.{optimizer}", "--optimizer.lr=1e-3")
    assert json.loads((run / "run.json").read_text())["audit"]["trained"]


def module(**options: Any) -> SequenceClassification:
    return SequenceClassification(make("bert"), LoRA(rank=2), **options)


def trained(folder: Path, *callbacks: Quantize, model: Any = None, **options: Any) -> Any:
    model = model or module()
    rows = loader(batches(class_rows([5, 6, 7, 5], [0, 1, 2, 1]), 2))
    quiet_trainer(folder, callbacks, max_steps=2, **options).fit(model, rows)
    return model


def test_adapters_are_in_the_format_that_is_asked_for_and_heads_in_float32(tmp_path: Path) -> None:
    model = trained(tmp_path, Quantize(block_size=32, adapter_dtype="bfloat16"))
    kinds = {name: p.dtype for name, p in model.adapter.parameters().items()}
    assert {kind for name, kind in kinds.items() if ".deltas." in name} == {torch.bfloat16}
    assert kinds["classifier.weight"] == torch.float32
    assert any(is_quantized(each) for each in model.modules())


NEAR_ONE = ["compacter", "dora", "hyperlora", "ia3", "mam", "p_tuning", "prefix", "vera"]


def entries(strategy: Any, folder: Path, dtype: Any) -> dict[str, tuple[int, int, torch.dtype]]:
    """Of each tensor of an adapter: how many entries a short training moves, of how many, and their number format."""
    torch.manual_seed(0)
    base = make("bert")
    for name, weight in base.named_parameters():  # DoRA's magnitudes are those of real models then
        weight.data.mul_(10.0 if name.endswith("query.weight") else 1.0)
    optimizer = partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.0)
    model = SequenceClassification(base, strategy, optimizer=optimizer, lr_scheduler=constant)
    rows = loader(batches(class_rows([5, 6, 7, 5], [0, 1, 2, 1]), 2))
    quiet_trainer(folder, [Quantize(block_size=32, adapter_dtype=dtype)], max_steps=8, max_epochs=4).fit(model, rows)
    kinds = {name: parameter.dtype for name, parameter in model.adapter.parameters().items()}
    return {each.name: (each.moved_entries, each.entries, kinds[each.name]) for each in model.verdict.trained
            if ".deltas." in each.name}  # fmt: skip


@pytest.mark.parametrize("recipe", NEAR_ONE)
def test_half_precision_trains_what_starts_near_one(recipe: str, tmp_path: Path) -> None:
    half, single = (entries(RECIPES[recipe](), tmp_path, dtype) for dtype in ("bfloat16", "float32"))
    for name, (moved, count, _) in half.items():
        assert moved >= 0.6 * single[name][0], f"{name}: {moved} of {count}, in float32 {single[name][0]}"
    assert {kind for *_, kind in single.values()} == {torch.float32}


@pytest.mark.parametrize("layer_norm", ["before", "after"])
def test_norms_and_scales_of_an_adapter_in_half_precision_train_too(layer_norm: Any, tmp_path: Path) -> None:
    found = entries(BottleneckAdapter(layer_norm=layer_norm, scale="learned", reduction_factor=4), tmp_path, "bfloat16")
    kinds = {kind: {name for name, (*_, each) in found.items() if each == kind} for *_, kind in found.values()}
    assert all("norm" in name or name.endswith("scale") for name in kinds[torch.float32])
    assert all("down" in name or "up" in name for name in kinds[torch.bfloat16])
    assert all(moved == count for name, (moved, count, _) in found.items() if name in kinds[torch.float32])


def test_two_of_them_and_other_quantizers_and_shards_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="two Quantize callbacks"):
        trained(tmp_path, Quantize(block_size=32), Quantize(bits=8))
    plugin = type("BitsandbytesPrecision", (), {})()  # Lightning's own does without a CUDA card not even begin
    with pytest.raises(UserError, match="BitsandbytesPrecision quantizes too"):
        Quantize().setup(SimpleNamespace(callbacks=[], precision_plugin=plugin), module(), "fit")  # type: ignore[arg-type]
    sharding = SimpleNamespace(callbacks=[], precision_plugin=None, strategy=type("ModelParallelStrategy", (), {})())
    with pytest.raises(UserError, match="does not go with ModelParallelStrategy"):
        Quantize().setup(sharding, module(), "fit")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"BitFit would train .* quantized"):
        trained(tmp_path, Quantize(block_size=32), model=SequenceClassification(make("bert"), BitFit()))


def test_a_model_that_is_quantized_already_is_loaded_or_refused(tmp_path: Path, decoder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    AutoModelForCausalLM.from_pretrained(decoder, quantization_config=four).save_pretrained(tmp_path / "four")
    AutoTokenizer.from_pretrained(decoder).save_pretrained(tmp_path / "four")
    for callbacks in ([], [Quantize(double_quant=False)]):
        model = CausalLM(str(tmp_path / "four"), LoRA(rank=2))
        model.quantization = callbacks[0].quantization if callbacks else None
        model.configure_model()
        assert any(is_quantized(each) for each in model.modules())
    model = CausalLM(str(tmp_path / "four"), LoRA(rank=2))
    model.quantization = Quantize(bits=8).quantization
    with pytest.raises(UserError, match=r"quantized already \(bitsandbytes, 4 bits nf4\)"):
        model.configure_model()


def test_an_adapter_trained_on_it_goes_on_a_plain_base_too(tmp_path: Path, encoder: Path) -> None:
    run = fit(tmp_path, encoder, *OVERLAY, *SENTIMENT)
    plain = plain_base(encoder)
    loaded = load_adapter(plain, run)
    assert not any(is_quantized(each) for each in plain.modules())
    assert loaded.parameters()


@pytest.mark.slow
def test_two_processes_hold_a_quantized_base_each_and_train_as_one(tmp_path: Path, encoder: Path) -> None:
    rows = "".join(f"sentence {i} is {'good' if i % 2 else 'bad'} {'very ' * (i % 5)}\t{i % 2}\n" for i in range(8))
    (tmp_path / "eight.tsv").write_text("sentence\tlabel\n" + rows)
    states = []
    for devices in (1, 2):
        root = tmp_path / str(devices)
        flags = [
            "--config", str(CONFIGS / "lora.yaml"), *OVERLAY, f"--model.base_model={encoder}",
            f"--data.source={tmp_path / 'eight.tsv'}", f"--data.validation_source={tmp_path / 'eight.tsv'}",
            f"--data.batch_size={8 // devices}", "--model.strategy.dropout=0", f"--trainer.default_root_dir={root}",
            "--trainer.accelerator=cpu", "--trainer.max_epochs=4", "--optimizer.lr=1e-2",
            *(["--trainer.strategy=ddp"] if devices == 2 else []),
        ]  # fmt: skip
        ranks = Ranks(devices, ["fit", *flags], tmp_path)
        assert ranks.ended() == [0] * devices, ranks.said()
        (run,) = root.iterdir()
        states.append(load_adapter(plain_base(encoder), run).state())
        assert read_record(run).base.quantization is not None
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=1e-4, atol=1e-5)


def plain_base(folder: Path) -> Any:
    model, _ = Source(str(folder)).load_model("AutoModelForSequenceClassification", num_labels=2)
    return model


def test_norms_and_heads_of_a_half_precision_base_are_in_float32(tmp_path: Path, decoder: Path) -> None:
    model = CausalLM(str(decoder), LoRA(rank=2), dtype="bfloat16", gradient_checkpointing=True)
    model.quantization = Quantize(block_size=32).quantization
    model.configure_model()
    kinds = {name: p.dtype for name, p in model.model.named_parameters()}
    for name, kind in kinds.items():
        if "norm" in name or name.startswith("lm_head") or ".deltas." in name:
            assert kind == torch.float32, name
    assert kinds["model.embed_tokens.weight"] == torch.bfloat16
    assert not model.model.get_input_embeddings().weight.requires_grad


def test_a_checkpoint_on_a_base_held_otherwise_is_told(tmp_path: Path, encoder: Path) -> None:
    run = fit(tmp_path, encoder, *OVERLAY, *SENTIMENT)
    again = ["--ckpt_path", str(run / "checkpoints" / "last.ckpt"), f"--trainer.default_root_dir={tmp_path / 'again'}"]
    plain = ["--config", str(CONFIGS / "lora.yaml"), f"--model.base_model={encoder}", *SENTIMENT]
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert main(["validate", *plain, "--trainer.accelerator=cpu", *again]) == 0
    (validated,) = (tmp_path / "again").iterdir()
    assert "was trained on a base held as {'bits': 4" in (validated / "log.txt").read_text()


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
@pytest.mark.parametrize("bits", [4, 8])
def test_biases_of_quantized_layers_stay_what_they_are(tmp_path: Path, bits: Any, precision: Any) -> None:
    """bitsandbytes rounds them to the format of the input; the audit at the end of a fit would refuse the adapter."""
    model = make("bert")
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith("dense.bias")}
    task = SequenceClassification(model, LoRA(rank=2))
    trained(tmp_path, Quantize(bits=bits, block_size=32), model=task, precision=precision)
    after = dict(task.model.named_parameters())
    assert all(torch.equal(after[name], value) and after[name].dtype == value.dtype for name, value in before.items())


def test_a_task_is_not_said_to_be_held_otherwise_than_it_is(tmp_path: Path) -> None:
    task = trained(tmp_path, Quantize(block_size=32))
    with pytest.raises(UserError, match="comes too late"):
        trained(tmp_path, Quantize(bits=8), model=task)


def test_a_half_precision_base_needs_mixed_precision(tmp_path: Path, decoder: Path) -> None:
    task = CausalLM(str(decoder), LoRA(rank=2), dtype="bfloat16")
    with pytest.raises(UserError, match=r"quantized base stay in float32.*bf16-mixed"):
        trained(tmp_path, Quantize(block_size=32), model=task)
