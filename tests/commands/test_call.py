"""What the words of a command line become, and what a person is told of those that are wrong."""

import re

import pytest

import peftlight.data
import peftlight.tasks
from peftlight.cli import main


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["combine", "a", "b", "--method", "svb"],
            "--method is 'svb'; expected one of sum, svd, ties, dare. Did you mean 'svd'",
        ),
        (["generate", "a", "--temperature", "hot"], "--temperature is 'hot'; expected a number."),
        (["generate", "a", "--batch_size", "1.5"], "--batch_size is '1.5'; expected a whole number"),
        (["generate", "a", "--promt", "x"], "generate has no argument '--promt x'. Did you mean '--prompt'"),
        (["diff", "a"], "diff needs TWO: peftlight diff ONE TWO."),
        (["diff", "a", "b", "c"], "diff has no argument 'c'."),
        (["inspect"], "inspect needs ADAPTER: "),
        (["merge", "a", "b", "--other_bas", "true"], "Did you mean '--other_base'"),
        (["merge", "a", "b", "--dtype", "auto"], "--dtype is 'auto'; expected one of float32, bfloat16, float16 or"),
        (["chat", "a", "--convert_pickle", "perhaps"], "--convert_pickle is 'perhaps'; expected true or false."),
        (["verify", "resum"], "WHAT is 'resum'; expected one of resume, ddp, parity, merge. Did you mean 'resume'?"),
        (
            ["verify", "ddp", "--device", "2", "--config", "c.yaml"],
            "has no argument '--device'. Did you mean '--devices'",
        ),
        (["verify", "ddp", "--configs", "c.yaml"], "verify has no argument '--configs'. Did you mean '--config'"),
        (["verify"], "verify needs WHAT, one of resume, ddp, parity, merge: peftlight verify WHAT."),
        (["verify", "resume", "c.yaml"], "verify has no argument 'c.yaml'. Did you mean --config c.yaml?"),
        (["verify", "resume"], "verify needs a configuration: "),
        (["verify", "resume", "--config", "nowhere.yaml"], "There is no file nowhere.yaml."),
        (["mergee", "a", "b"], "There is no command 'mergee'. Did you mean 'merge'?"),
    ],
)
def test_wrong_words_are_named_with_what_was_expected(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert told in said.err
    assert said.out == ""


@pytest.mark.parametrize(
    ("arguments", "of_adapter"),
    [
        (["ADAPTER", "FILE"], True),
        (["--dtype", "float32", "ADAPTER", "FILE"], True),
        (["--dtype=float32", "ADAPTER", "FILE"], True),
        (["--help", "ADAPTER"], True),
        (["ADAPTER", "FILE", "--config", "c.yaml"], True),
        (["--config", "c.yaml"], False),
        (["--config=c.yaml", "--data.batch_size", "2", "--print_config"], False),
        (["--help-all"], False),
        ([], False),
    ],
)
def test_predict_takes_an_adapter_where_a_word_stands_alone(
    arguments: list[str], of_adapter: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[bool, list[str]]] = []

    def call(command: str, rest: list[str]) -> int:
        ran.append((True, rest))
        return 0

    monkeypatch.setattr("peftlight.commands.call.call", call)
    monkeypatch.setattr("peftlight.lightning_cli.run", lambda given: ran.append((False, given[1:])))
    # After the line above, whose import would keep this one for all later tests.
    monkeypatch.setattr("peftlight.config_errors.given.read_given", lambda given: None)
    assert main(["predict", *arguments]) == 0
    assert ran == [(of_adapter, [word.replace("--help-all", "--help") for word in arguments])]


def test_the_help_speaks_of_no_types_of_python(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["verify", "--help"])
    said = capsys.readouterr().out
    assert "--config FILE [--KEY VALUE ...]" in said.partition("\n\n")[0]
    assert "optimizer steps of each training. (default: 6)" in said
    assert "Literal" not in said
    assert "type:" not in said


def test_the_help_of_fit_names_every_task_and_data_set(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--help"]) == 0
    said = capsys.readouterr().out
    chosen = {*peftlight.tasks.__all__, *peftlight.data.__all__}
    chosen -= {"LinearWarmup", "PEFTModule", "TaskCallback", "DataFamily", "Summary", "TextData"}  # and no tasks
    assert {name for name in chosen if not re.search(rf"\b{name}\b", said)} == set()


def test_the_help_of_predict_shows_both_forms(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "--help"]) == 0
    said = capsys.readouterr().out
    assert said.index("predict ADAPTER FILE") < said.index("--out FILE") < said.index("predict --config FILE")
    assert main(["--help"]) == 0
    assert capsys.readouterr().out.partition("COMMAND ADAPTER")[2].split()[4] == "predict"
