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
        (["mergee", "a", "b"], "There is no command 'mergee'. Did you mean 'merge'?"),
    ],
)
def test_wrong_words_are_named_with_what_was_expected(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert told in capsys.readouterr().err
