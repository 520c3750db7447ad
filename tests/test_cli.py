"""The command line from end to end, on a tiny model and on the rows that peftlight ships."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    BertForSequenceClassification,
)

from peftlight import load_adapter
from peftlight.cli import main
from processes.ranks import Ranks
from recipes import RECIPES
from tasks.small import QUIET

pytestmark = [
    *QUIET,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]
CONFIGS = Path(__file__).parents[1] / "configs"


def options(tmp_path: Path, base: Path, source: str, **more: object) -> list[str]:
    flags = {
        "model.base_model": base,
        "data.source": source,
        "trainer.default_root_dir": tmp_path / "runs",
        "trainer.accelerator": "cpu",
        "trainer.max_epochs": 1,
        "trainer.limit_train_batches": 2,
        "trainer.log_every_n_steps": 1,
        **more,
    }
    return [f"--{name}={value}" for name, value in flags.items()]


def evaluating(flags: list[str]) -> list[str]:
    """The options without those of a fit."""
    return [flag for flag in flags if "max_epochs" not in flag and "limit_train" not in flag]


def only_run(tmp_path: Path) -> Path:
    (run,) = (tmp_path / "runs").iterdir()
    return run


def fit(config: str, flags: list[str]) -> int:
    return main(["fit", "--config", str(CONFIGS / config), "--traceback", *flags])


def test_a_run_folder_holds_everything_that_was_asked_for_and_trained(tmp_path: Path, encoder: Path) -> None:
    assert fit("lora.yaml", options(tmp_path, encoder, "sample:sentiment")) == 0
    run = only_run(tmp_path)
    assert {p.name for p in run.iterdir()} >= {"config.yaml", "run.json", "log.txt", "metrics.csv", "curves.png",
                                               "adapter", "checkpoints"}  # fmt: skip
    record = json.loads((run / "run.json").read_text())
    assert record["state"] == "finished"
    assert record["seed"] == 42
    assert record["versions"]["torch"] == torch.__version__
    assert len(record["data_fingerprint"]) == 64
    assert "val_accuracy" in record["metrics"]
    assert {p.name for p in (run / "adapter").glob("*.safetensors")} == {"adapter_model.safetensors"}
    saved = load_file(run / "adapter" / "adapter_model.safetensors")
    assert sorted(k.rpartition("model.")[2] for k in saved if "lora" not in k) == [
        "classifier.bias",
        "classifier.weight",
    ]
    with open(run / "metrics.csv", newline="") as file:
        assert {"train_loss", "val_loss", "val_accuracy"} <= set(next(csv.reader(file)))


def test_the_adapter_of_a_run_gives_the_trained_models_logits_here_and_in_hf_peft(
    tmp_path: Path, encoder: Path
) -> None:
    from peft import PeftModel

    from peftlight.tasks import SequenceClassification

    assert fit("lora.yaml", options(tmp_path, encoder, "sample:sentiment", **{"optimizer.lr": 0.05})) == 0
    run = only_run(tmp_path)
    trained = SequenceClassification.load_from_checkpoint(run / "checkpoints" / "last.ckpt", weights_only=True).eval()
    ids = torch.randint(4, 400, (3, 9))
    with torch.no_grad():
        expected = trained(input_ids=ids).logits
        theirs = PeftModel.from_pretrained(fresh(encoder), run / "adapter").eval()(input_ids=ids).logits
        model = fresh(encoder)
        load_adapter(model, run / "adapter")
        ours = model.eval()(input_ids=ids).logits
    assert trained.label_names == ["negative", "positive"]
    assert (theirs - expected).abs().max() < 1e-6
    assert torch.equal(ours, expected)


def fresh(encoder: Path) -> BertForSequenceClassification:
    return BertForSequenceClassification.from_pretrained(encoder, num_labels=2)


def test_two_runs_with_one_configuration_never_share_a_folder(tmp_path: Path, encoder: Path) -> None:
    for _ in range(2):
        assert fit("bitfit.yaml", options(tmp_path, encoder, "sample:sentiment")) == 0
    assert len(list((tmp_path / "runs").iterdir())) == 2


@pytest.mark.parametrize("config", [f"{name}.yaml" for name in ("demo", *sorted(RECIPES))])
def test_every_config_trains_two_steps(config: str, tmp_path: Path, encoder: Path) -> None:
    assert fit(config, options(tmp_path, encoder, "sample:sentiment")) == 0
    assert json.loads((only_run(tmp_path) / "run.json").read_text())["state"] == "finished"


OVERLAYS = {
    "alpaca.yaml": ("instructions", "decoder", "val_perplexity"),
    "alpaca_seq2seq.yaml": ("instructions", "encoder_decoder", "val_rouge_l"),
    "dialogsum.yaml": ("dialogues", "encoder_decoder", "val_rouge_l"),
    "english_quotes.yaml": ("quotes", "decoder", "val_perplexity"),
    "entities.yaml": ("entities", "encoder", "val_recall"),
    "images.yaml": ("shapes", "vision", "val_accuracy"),
    "sst2.yaml": ("sentiment", "encoder", "val_accuracy"),
}
"""The sample that stands in for each overlay's data, the fixture of a model for it, and what is measured."""


@pytest.mark.parametrize("strategy", ["lora.yaml", "full.yaml"])
@pytest.mark.parametrize("overlay", sorted(p.name for p in (CONFIGS / "data").glob("*.yaml")))
def test_every_data_overlay_trains_with_a_strategy(
    strategy: str, overlay: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    sample, model, metric = OVERLAYS[overlay]
    base = request.getfixturevalue(model)
    flags = ["--config", str(CONFIGS / "data" / overlay), *options(tmp_path, base, f"sample:{sample}")]
    assert fit(strategy, flags) == 0
    assert metric in json.loads((only_run(tmp_path) / "run.json").read_text())["metrics"]


@pytest.mark.parametrize("command", ["validate", "test"])
def test_evaluation_of_a_checkpoint_gives_the_metrics_of_the_fit(command: str, tmp_path: Path, encoder: Path) -> None:
    flags = options(tmp_path, encoder, "sample:sentiment", **{"data.test_source": "sample:sentiment"})
    assert fit("lora.yaml", flags) == 0
    run = only_run(tmp_path)
    expected = json.loads((run / "run.json").read_text())["metrics"]
    again = [*flags, f"--trainer.default_root_dir={tmp_path / 'again'}", f"--ckpt_path={run / 'checkpoints/last.ckpt'}"]
    kept = evaluating(again)
    assert main([command, "--config", str(CONFIGS / "lora.yaml"), *kept]) == 0
    (folder,) = (tmp_path / "again").iterdir()
    metrics = json.loads((folder / "run.json").read_text())["metrics"]
    if command == "validate":
        assert metrics["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-6)
    assert f"{'val' if command == 'validate' else 'test'}_accuracy" in metrics


def test_an_adapters_folder_is_no_checkpoint(tmp_path: Path, encoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = options(tmp_path, encoder, "sample:sentiment")
    assert fit("lora.yaml", flags) == 0
    folder = only_run(tmp_path) / "adapter"
    assert main(["validate", "--config", str(CONFIGS / "lora.yaml"), *evaluating(flags), f"--ckpt_path={folder}"]) == 2
    assert "is the folder of an adapter. Give the run's checkpoint" in capsys.readouterr().err


def test_a_run_that_trained_nothing_is_an_error(
    tmp_path: Path, encoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = options(tmp_path, encoder, "sample:sentiment", **{"lr_scheduler": "ConstantLR", "lr_scheduler.factor": 0})
    assert main(["fit", "--config", str(CONFIGS / "lora.yaml"), *flags]) == 2
    told = "Nothing was trained: after 2 optimizer steps all 10 trained tensors are where they started. The learning "
    assert f"{told}rate was 0 in every step, by ConstantLR" in capsys.readouterr().err
    run = only_run(tmp_path)
    assert json.loads((run / "run.json").read_text())["state"] == "failed"
    assert not (run / "adapter").exists()


def test_a_run_that_ends_early_says_which_plan_does_not_hold(tmp_path: Path, encoder: Path) -> None:
    flags = options(tmp_path, encoder, "sample:sentiment", **{
        "trainer.max_epochs": 9, "trainer.callbacks": "EarlyStopping", "trainer.callbacks.monitor": "val_loss",
        "trainer.callbacks.stopping_threshold": 100,
    })  # fmt: skip
    assert fit("adalora.yaml", flags) == 0
    run = only_run(tmp_path)
    record = json.loads((run / "run.json").read_text())
    assert (record["steps"], record["steps_planned"]) == (2, 18)
    budget, schedule = record["audit"]["unmet"]
    ranks = json.loads((run / "adapter" / "adapter_config.json").read_text())["rank_pattern"]
    left = sum(sum(rank) if isinstance(rank, list) else rank for rank in ranks.values())
    assert f"AdaLoRA's budget is not met: {left} singular values are left" in budget
    assert "over 18 steps, and the training ended after 2" in schedule
    assert budget in (run / "log.txt").read_text()


def test_predict_writes_one_line_for_each_row_with_its_id(tmp_path: Path, encoder: Path) -> None:
    file = tmp_path / "mine.tsv"
    file.write_text("sentence\nfirst one\nsecond one\nthird one\n")
    flags = [*options(tmp_path, encoder, "sample:sentiment"), f"--data.predict_source={file}", "--data.batch_size=2"]
    kept = evaluating(flags)
    assert main(["predict", "--config", str(CONFIGS / "lora.yaml"), *kept]) == 0
    lines = (only_run(tmp_path) / "predictions.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["id"] for record in records] == [0, 1, 2]
    assert {record["label"] for record in records} <= {"negative", "positive"}


def test_predict_of_a_language_model_writes_completions(tmp_path: Path, decoder: Path) -> None:
    flags = options(tmp_path, decoder, "sample:instructions", **{"model.max_new_tokens": 3})
    kept = evaluating(flags)
    overlay = ["--config", str(CONFIGS / "lora.yaml"), "--config", str(CONFIGS / "data" / "alpaca.yaml")]
    assert main(["predict", *overlay, *kept, "--trainer.limit_predict_batches=1"]) == 0
    records = [json.loads(line) for line in (only_run(tmp_path) / "predictions.jsonl").read_text().splitlines()]
    assert all(set(record) == {"id", "prompt", "completion"} for record in records)


def test_predict_of_an_encoder_decoder_writes_what_it_generates(tmp_path: Path, encoder_decoder: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps({"dialogue": f"A: {word}"}) + "\n" for word in ("hello", "come here", "no")))
    flags = options(tmp_path, encoder_decoder, "sample:dialogues", **{"model.max_new_tokens": 3})
    kept = [*evaluating(flags), f"--data.predict_source={file}", "--data.batch_size=2"]
    overlay = ["--config", str(CONFIGS / "lora.yaml"), "--config", str(CONFIGS / "data" / "dialogsum.yaml")]
    assert main(["predict", *overlay, *kept]) == 0
    records = [json.loads(line) for line in (only_run(tmp_path) / "predictions.jsonl").read_text().splitlines()]
    assert [record["id"] for record in records] == [0, 1, 2]
    assert all(set(record) == {"id", "source", "generated"} for record in records)
    read = records[1]["source"].replace(" ", "").replace("Ġ", " ").strip()  # this tokenizer does not join its tokens
    assert read == "summarize: A: come here"


def test_predict_of_words_writes_a_tag_for_each(tmp_path: Path, encoder: Path) -> None:
    file = tmp_path / "mine.conll"
    file.write_text("Ines\nleft\nOslo\n\nRain\nfell\nfrom\nthe\nextraordinary\nsky\n")
    given = {"data.predict_source": file, "data.max_length": 12}
    overlay = ["--config", str(CONFIGS / "lora.yaml"), "--config", str(CONFIGS / "data" / "entities.yaml")]
    assert main(["predict", *overlay, *evaluating(options(tmp_path, encoder, "sample:entities", **given))]) == 0
    records = [json.loads(line) for line in (only_run(tmp_path) / "predictions.jsonl").read_text().splitlines()]
    assert [record["id"] for record in records] == [0, 1]
    assert records[1]["words"] == ["Rain", "fell", "from", "the", "extraordinary", "sky"]
    assert [len(record["tags"]) for record in records] == [3, 6]
    assert records[1]["tags"][-1] is None
    assert {tag for record in records for tag in record["tags"]} <= {
        None, "O", *(f"{at}-{kind}" for at in "BI" for kind in ("PER", "ORG", "LOC", "MISC"))
    }  # fmt: skip


def test_predict_of_images_writes_their_files(tmp_path: Path, vision: Path) -> None:
    flags = evaluating(options(tmp_path, vision, "sample:shapes", **{"data.validation_size": 9}))
    overlay = ["--config", str(CONFIGS / "lora.yaml"), "--config", str(CONFIGS / "data" / "images.yaml")]
    assert main(["predict", *overlay, *flags]) == 0
    records = [json.loads(line) for line in (only_run(tmp_path) / "predictions.jsonl").read_text().splitlines()]
    assert len(records) == 9
    for record in records:
        assert int(record["file"].removesuffix(".ppm").rpartition("-")[2]) == record["id"]
        assert record["label"] in ("circle", "square", "triangle")


def test_the_users_callbacks_are_added_to_ours(tmp_path: Path, encoder: Path) -> None:
    extra = tmp_path / "extra.yaml"
    extra.write_text("trainer:\n  callbacks:\n    - class_path: LearningRateMonitor\n")
    flags = options(tmp_path, encoder, "sample:sentiment")
    assert fit("lora.yaml", ["--config", str(extra), *flags]) == 0
    run = only_run(tmp_path)
    with open(run / "metrics.csv", newline="") as file:
        assert any(name.startswith("lr-AdamW") for name in next(csv.reader(file)))
    assert (run / "adapter").is_dir()
    assert (run / "checkpoints" / "last.ckpt").exists()


def test_values_on_the_command_line_beat_those_in_a_checkpoint(tmp_path: Path, encoder: Path) -> None:
    flags = options(tmp_path, encoder, "sample:sentiment")
    assert fit("lora.yaml", flags) == 0
    checkpoint = only_run(tmp_path) / "checkpoints" / "last.ckpt"
    code = main(["fit", "--config", str(CONFIGS / "lora.yaml"), *flags, f"--ckpt_path={checkpoint}",
                 "--model.strategy.rank=4"])  # fmt: skip
    assert code == 2  # rank 4 was asked for, and the checkpoint's rank 8 does not fit it


def test_a_full_disk_is_an_error_that_leaves_the_last_run_whole(tmp_path: Path, encoder: Path) -> None:
    """The limit on a file's size stands in for a disk without room."""
    flags = options(tmp_path, encoder, "sample:sentiment", **{"trainer.enable_checkpointing": "false"})
    assert fit("lora.yaml", flags) == 0
    before = {p: p.read_bytes() for p in only_run(tmp_path).rglob("*.safetensors")}
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000));"
        "from peftlight.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, "fit", "--config", str(CONFIGS / "lora.yaml"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 2, done.stderr[-2000:]
    assert "peftlight: error: No room left to write" in done.stderr
    assert "Traceback" not in done.stderr
    assert {p: p.read_bytes() for p in before} == before


@pytest.mark.slow
def test_two_processes_train_the_adapter_of_one(tmp_path: Path, encoder: Path) -> None:
    """DDP with gloo on two CPU processes against one process with the same global batch."""
    rows = "".join(
        f"sentence number {i} is {'good' if i % 2 else 'bad'} {'very ' * (i % 5)}\t{i % 2}\n" for i in range(8)
    )
    source = tmp_path / "eight.tsv"
    source.write_text("sentence\tlabel\n" + rows)
    adapters = []
    for processes, batch in ((1, 8), (2, 4)):
        root = tmp_path / str(processes)
        root.mkdir()
        flags = options(root, encoder, str(source), **{
            "data.validation_source": source, "data.batch_size": batch, "trainer.max_epochs": 6,
            "model.strategy.dropout": 0, "optimizer.lr": 0.01,
            **({"trainer.strategy": "ddp"} if processes == 2 else {}),
        })  # fmt: skip
        ranks = Ranks(processes, ["fit", "--config", str(CONFIGS / "lora.yaml"), *flags], root)
        assert ranks.ended() == [0] * processes, ranks.said()
        (run,) = (root / "runs").iterdir()
        adapters.append(load_file(run / "adapter" / "adapter_model.safetensors"))
        assert json.loads((run / "run.json").read_text())["processes"] == processes
    one, two = adapters
    assert one.keys() == two.keys()
    assert max((one[name] - two[name]).abs().max() for name in one) < 1e-5
    assert any(tensor.abs().max() > 1e-3 for name, tensor in one.items() if "lora_B" in name)
