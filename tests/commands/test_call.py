"""What the words of a command line become, and what a person is told of those that are wrong."""

import pytest

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
        (["diff", "a"], "required: two"),
        (["diff", "a", "b", "c"], "diff has no argument 'c'."),
        (["inspect"], "required: adapter"),
        (["merge", "a", "b", "--other_bas", "true"], "Did you mean '--other_base'"),
        (["merge", "a", "b", "--dtype", "auto"], "--dtype is 'auto'; expected one of float32, bfloat16, float16 or"),
        (["chat", "a", "--convert_pickle", "perhaps"], "--convert_pickle is 'perhaps'; expected true or false."),
        (["mergee", "a", "b"], "There is no command 'mergee'. Did you mean 'merge'?"),
    ],
)
def test_wrong_words_are_named_with_what_was_expected(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert told in capsys.readouterr().err


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
    monkeypatch.setattr("peftlight.commands.call.call", lambda command, rest: ran.append((True, rest)))
    monkeypatch.setattr("peftlight.config_errors.given.read_given", lambda given: None)
    monkeypatch.setattr("peftlight.lightning_cli.run", lambda given: ran.append((False, given[1:])))
    assert main(["predict", *arguments]) == 0
    assert ran == [(of_adapter, [word.replace("--help-all", "--help") for word in arguments])]


def test_the_help_of_predict_shows_both_forms(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "--help"]) == 0
    said = capsys.readouterr().out
    assert said.index("predict ADAPTER FILE") < said.index("--out FILE") < said.index("predict --config FILE")
    assert main(["--help"]) == 0
    assert capsys.readouterr().out.partition("COMMAND ADAPTER")[2].split()[4] == "predict"
