"""`peftlight fit --trainer.strategy fsdp2` in real processes: the adapter's folder of one process, and its resuming."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from processes.ranks import Ranks

pytestmark = pytest.mark.slow
CONFIG = Path(__file__).parents[2] / "configs" / "lora.yaml"
KEEP_ALL = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
            "init_args": {"save_top_k": -1, "every_n_train_steps": 1, "filename": "{step}"}}  # fmt: skip


def fit(processes: int, folder: Path, *arguments: object) -> None:
    ranks = Ranks(processes, ["fit", *map(str, arguments)], folder)
    assert ranks.ended() == [0] * processes, ranks.said()


def run(processes: int, folder: Path, encoder: Path, *arguments: str) -> Path:
    """The run folder of a training of three epochs with eleven rows, eight to a step."""
    rows = (f"sentence number {i} is {'good' if i % 2 else 'bad'} {'very ' * (i % 5)}\t{i % 2}\n" for i in range(11))
    source, callbacks, root = folder / "rows.tsv", folder / "callbacks.yaml", folder / f"{processes}{len(arguments)}"
    source.write_text("sentence\tlabel\n" + "".join(rows))
    callbacks.write_text(yaml.safe_dump({"trainer": {"callbacks": [KEEP_ALL]}}))
    fit(processes, folder, "--config", CONFIG, "--config", callbacks,
        f"--model.base_model={encoder}", f"--data.source={source}",
        f"--data.validation_source={source}", f"--data.batch_size={8 // processes}", "--optimizer.lr=0.01",
        f"--trainer.default_root_dir={root}", "--trainer.accelerator=cpu", "--trainer.max_epochs=3",
        "--trainer.log_every_n_steps=1", *arguments)  # fmt: skip
    (made,) = root.iterdir()
    return made


def test_the_folder_of_an_adapter_is_that_of_one_process(tmp_path: Path, encoder: Path) -> None:
    one = run(1, tmp_path, encoder, "--model.strategy.dropout=0") / "adapter"
    two = run(2, tmp_path, encoder, "--model.strategy.dropout=0", "--trainer.strategy=fsdp2") / "adapter"
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
    assert (one / "adapter_config.json").read_bytes() == (two / "adapter_config.json").read_bytes()
    record, other = (json.loads((folder / "peftlight.json").read_text()) for folder in (one, two))
    assert metrics_of(other) == pytest.approx(metrics_of(record), abs=1e-5)
    differing = {"sha256": "", "metrics": {}}
    assert {**record, **differing} == {**other, **differing}
    tensors, others = (load_file(folder / "adapter_model.safetensors") for folder in (one, two))
    assert {key: (value.shape, value.dtype) for key, value in tensors.items()} == {
        key: (value.shape, value.dtype) for key, value in others.items()
    }
    assert max((value - others[key]).abs().max() for key, value in tensors.items()) < 1e-5
    assert any(value.abs().max() > 1e-3 for key, value in tensors.items() if "lora_B" in key)


def metrics_of(record: dict[str, dict[str, float]]) -> dict[str, float]:
    """Those of an adapter's record that do not measure time."""
    return {key: value for key, value in record["metrics"].items() if key != "tokens_per_second"}


def test_a_run_goes_on_from_its_checkpoint_bit_for_bit(tmp_path: Path, encoder: Path) -> None:
    through = run(2, tmp_path, encoder, "--trainer.strategy=fsdp2")  # with the dropout of the configuration
    start = tmp_path / "step=3.ckpt"  # in the middle of an epoch; beside a finished run there is nothing to go on with
    shutil.copy(through / "checkpoints" / start.name, start)
    fit(2, tmp_path, "--resume", start, f"--trainer.default_root_dir={tmp_path / 'resumed'}")
    (resumed,) = (tmp_path / "resumed").iterdir()
    record = json.loads((resumed / "run.json").read_text())
    assert ([entry["step"] for entry in record["resumed"]], record["steps"]) == ([3], 6)
    other = ("--optimizer=SGD", "--optimizer.lr=0.1", "--allow_changes=optimizer", "--trainer.max_steps=4",
             "--allow_changes=trainer.max_steps")  # fmt: skip
    without_a_past = ("--resume", start, f"--trainer.default_root_dir={tmp_path / 'other'}", *other)
    fit(2, tmp_path, *without_a_past)
    names = ("adapter_model.safetensors", "adapter_config.json")
    assert all((through / "adapter" / name).read_bytes() == (resumed / "adapter" / name).read_bytes() for name in names)
