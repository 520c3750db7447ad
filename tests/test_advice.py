"""What a message advises works: the command as the message would have it does not meet a second refusal."""

import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from bad_inputs.kit import REVIEWS, fill
from bad_inputs.outcome import outcome, working_folder
from bad_inputs.row import row
from peftlight.cli import main
from tasks.small import QUIET

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore")]

_FIT = "fit --config run.yaml"
_WRITE = "fit --config write.yaml"
_STRATEGY = "--model.strategy"
_LABELS = "text,label\n" + "a film to see again,0\na river,1\n" * 30
_IDS = "id,review,stars\n" + "".join(f"u{n},a film to see {n} times,{1 + n % 3}\n" for n in range(12))
_LONG = REVIEWS + "see " * 700 + ",1\n"


@dataclass(frozen=True)
class Advice:
    """A command that is refused, and what its message advises."""

    refused: str
    says: str
    """What of the message is the advice."""
    then: str
    """The command that follows it."""
    files: Mapping[str, str] = field(default_factory=dict)
    make: Callable[[], object] = lambda: None


def _no_tokenizer() -> None:
    Path("words").mkdir()
    for file in Path("encoder").glob("tokenizer*"):
        file.rename(Path("words") / file.name)


def _unknown_checksum() -> None:
    file = Path("trained/adapter/peftlight.json")
    file.write_text(json.dumps({key: value for key, value in json.loads(file.read_text()).items() if key != "sha256"}))


def _limited() -> None:
    """A run that came to max_steps and max_epochs alike."""
    assert main([*shlex.split(_FIT), "--trainer.max_steps=1", "--trainer.default_root_dir=limited"]) == 0
    next(Path("limited").iterdir()).rename("steps")


def _merged() -> None:
    assert main(["merge", "trained", "merged"]) == 0


def _fit(option: str, says: str, then: str, **how: object) -> Advice:
    return Advice(f"{_FIT} {option}", says, f"{_FIT} {then}", **how)  # type: ignore[arg-type]


def _strategy(options: str, says: str, then: str, fit: str = f"{_FIT} --data.batch_size 1") -> Advice:
    def keys(text: str) -> str:
        name, *settings = text.split()
        return " ".join([f"{_STRATEGY} {name}", *(f"{_STRATEGY}.{setting}" for setting in settings)])

    return Advice(f"{fit} {keys(options)}", says, f"{fit} {keys(then)}")


COMMANDS = [
    Advice("evalute trained", "'evaluate'", "evaluate trained"),
    Advice("--config run.yaml", "peftlight fit --config run.yaml", "fit --config run.yaml"),
    Advice("evaluate trained --splitt validation", "'--split'", "evaluate trained --split validation"),
    Advice("evaluate trained --limit 0", "at least 1", "evaluate trained --limit 1"),
    Advice("evaluate trained --split test", "--split validation", "evaluate trained --split validation"),
    Advice("evaluate trained --split test", "--source FILE", "evaluate trained --split test --source reviews.csv"),
    Advice("evaluate trained --source review.csv", "'reviews.csv'", "evaluate trained --source reviews.csv"),
    Advice("evaluate ./trainde", "'trained'", "evaluate ./trained"),
    Advice("evaluate trained/adaptr", "'adapter'", "evaluate trained/adapter"),
    Advice("evaluate trained trained", "NAME=trained", "evaluate trained NAME=trained"),
    Advice("generate trained --prompt Once", "predict ADAPTER FILE", "predict trained reviews.csv"),
    Advice("merge trained encoder", "Choose another folder", "merge trained new"),
    Advice("merge trained merged", "--overwrite true", "merge trained merged --overwrite true", make=_merged),
    Advice("merge trained --out new", "merge ADAPTER OUT", "merge trained new"),
    Advice(
        "combine trained other=trained:-1 both", "heads_from trained",
        "combine trained other=trained:-1 both --heads_from trained",
    ),
    Advice("evaluate trained", "Delete it", "evaluate trained/adapter --config run.yaml", make=_unknown_checksum),
    Advice(
        "predict trained bad.csv", "columns: {text: review}", "predict trained bad.csv --columns '{text: review}'",
        files={"bad.csv": "review\na film\n"},
    ),
    Advice("fit --config runn.yaml", "'run.yaml'", "fit --config run.yaml"),
]  # fmt: skip

OPTIONS = [
    _fit("--trainer.max_epocs 1", "'max_epochs'", "--trainer.max_epochs 1"),
    _fit("--learning_rate 1e-4", "--optimizer.lr", "--optimizer.lr 1e-4"),
    _fit("--model.strategy LoRa", "'LoRA'", "--model.strategy LoRA"),
    _fit("--optimizer AdamV", "'Adam'", "--optimizer Adam"),
    _fit("--lr_scheduler Cosine --lr_scheduler.T_max 3", "CosineAnnealingLR",
         "--lr_scheduler CosineAnnealingLR --lr_scheduler.T_max 3"),
    _fit("--trainer.callbacks+=EarlyStopping --trainer.callbacks.monitor=val_acuracy", "'val_accuracy'",
         "--trainer.callbacks+=EarlyStopping --trainer.callbacks.monitor=val_accuracy"),
    _fit("--model.dtype float31", "'float32'", "--model.dtype float32"),
    _fit("--model.dtype float16 --trainer.precision 16-mixed", "--model.dtype float32 --trainer.precision 32-true",
         "--model.dtype float32 --trainer.precision 32-true"),
    _fit("--model.dtype bfloat16 --trainer.precision 32-true", "--trainer.precision bf16-mixed",
         "--model.dtype bfloat16 --trainer.precision bf16-mixed"),
    _fit("--model.dtype bfloat16 --trainer.precision 32-true", "--model.dtype float32",
         "--model.dtype float32 --trainer.precision 32-true"),
    _fit("--trainer.precision 17", "bf16-mixed", "--trainer.precision bf16-mixed"),
    _fit("--trainer.max_epochs -1", "--trainer.max_steps", "--trainer.max_epochs -1 --trainer.max_steps 2"),
    _fit("--data.batch_size 0", "at least 1", "--data.batch_size 1"),
    _fit("--model.base_model ./encodr", "'encoder'", "--model.base_model ./encoder"),
    _fit("--model.base_model trained/adapter", "--init_adapter trained/adapter", "--init_adapter trained/adapter"),
    _fit("", "--data.tokenizer NAME", "--data.tokenizer ./words", make=_no_tokenizer),
    _fit("--allow_changes optimizer.lr", "leave it out", ""),
    _fit("--trainer.default_root_dir reviews.csv", "a folder", "--trainer.default_root_dir elsewhere"),
    Advice("fit --resume steps --trainer.max_steps 3", "--allow_changes trainer.max_steps trainer.max_epochs",
           "fit --resume steps --trainer.max_steps 3 --allow_changes trainer.max_steps trainer.max_epochs "
           "--trainer.max_epochs 3", make=_limited),
    Advice("fit --resume trained", "--trainer.max_epochs N --allow_changes trainer.max_epochs",
           "fit --resume trained --trainer.max_epochs 2 --allow_changes trainer.max_epochs"),
    Advice("fit --resume trained", "--init_adapter trained", f"{_FIT} --init_adapter trained"),
    Advice("fit --resume trained --optimizer.lr 0.1",
           "--allow_changes optimizer.lr trainer.max_epochs, with more to do: --trainer.max_epochs N",
           "fit --resume trained --optimizer.lr 0.1 --allow_changes optimizer.lr trainer.max_epochs "
           "--trainer.max_epochs 2"),
    Advice("fit --resume trained/adapter", "--init_adapter trained/adapter", f"{_FIT} --init_adapter trained/adapter"),
]  # fmt: skip

STRATEGIES = [
    _strategy("LoRA rank=64", "Set rank to 32", "LoRA rank=32"),
    _strategy("LoRA target_modules=[querry]", "'query'", "LoRA target_modules=[query]"),
    _strategy("LoRA init_lora_weights=pisa", "'pissa'", "LoRA init_lora_weights=pissa"),
    _strategy("LoRA use_dora=true init_lora_weights=pissa", "gaussian",
              "LoRA use_dora=true init_lora_weights=gaussian"),
    _strategy("AdaLoRA init_r=4 target_r=8", "Set init_r to 9", "AdaLoRA init_r=9 target_r=8"),
    _strategy("AdaLoRA init_r=4 target_r=8", "or target_r to 3", "AdaLoRA init_r=4 target_r=3"),
    _strategy("PrefixTuning encoder_hidden_size=8", "Set prefix_projection to true",
              "PrefixTuning encoder_hidden_size=8 prefix_projection=true"),
    _strategy("PTuning encoder_num_layers=3", "set encoder to lstm", "PTuning encoder_num_layers=3 encoder=lstm"),
    _strategy("BitFit", "Choose LoRA", "LoRA", fit=_WRITE),
]  # fmt: skip

DATA = [
    _fit("--data.source review.csv", "'reviews.csv'", "--data.source reviews.csv"),
    _fit("--data.source bad.csv", "columns: {text: review, label: stars}",
         "--data.source bad.csv --data.columns '{text: review, label: stars}'", files={"bad.csv": _IDS}),
    _fit("--data.source bad.csv", "labels: ['0', '1', '7']",
         """--data.source bad.csv --data.labels "['0', '1', '7']" """, files={"bad.csv": _LABELS + "patience,7\n"}),
    _fit("--data.labels '[good]'", "two different names", "--data.labels '[bad, good]'"),
    _fit("--data.source bad.csv", "--data.quoting none", "--data.source bad.csv --data.quoting none",
         files={"bad.csv": REVIEWS + '"a" film,1\n'}),
    _fit("--data.source long.csv --data.max_length 600", "Set max_length to 512 or less: --data.max_length",
         "--data.source long.csv --data.max_length 512", files={"long.csv": _LONG}),
    _fit("--data.source long.csv --data.max_length 600 --model.strategy PromptTuning", "Set max_length to 492 or less",
         "--data.source long.csv --data.max_length 492 --model.strategy PromptTuning", files={"long.csv": _LONG}),
    _fit("--data.source long.csv --data.max_length 500 --model.strategy PromptTuning", "Cut rows to 492 tokens",
         "--data.source long.csv --data.max_length 492 --model.strategy PromptTuning", files={"long.csv": _LONG}),
    _fit("--data Instructions --data.source tasks.jsonl", "TextClassification",
         "--data TextClassification --data.source reviews.csv"),
    _fit("--data.subset english", "the source 'reviews.csv' is local", ""),
    Advice(f"{_WRITE} --data.max_length 8", "the longest has 101 tokens. Raise", f"{_WRITE} --data.max_length 101"),
    Advice(f"{_WRITE} --data.template '{{task}}'", "{instruction}",
           f"{_WRITE} --data.template '{{instruction}} {{input}} '"),
]  # fmt: skip

ALL = [*COMMANDS, *OPTIONS, *STRATEGIES, *DATA]


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with working_folder(None, tmp_path_factory.mktemp("kit") / "kit") as folder:
        fill(folder)
    return folder


@pytest.mark.parametrize("advice", ALL, ids=lambda advice: f"{advice.refused} -> {advice.says}")
def test_what_a_message_advises_works(
    advice: Advice, kit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with working_folder(kit, tmp_path / "work") as folder:
        code, message = outcome(row("", advice.refused, files=advice.files, make=advice.make), folder)
        assert code == 2
        assert advice.says in message
        if advice.says == "Delete it":
            Path("trained/adapter/peftlight.json").unlink()
        assert main(shlex.split(advice.then)) == 0, capsys.readouterr().err
