"""`peftlight evaluate`: adapters and their base side by side, by the metrics of their task."""

from typing import Literal

from peftlight.opening import Opening


def evaluate(
    adapters: list[str],
    opening: Opening,
    config: str | None = None,
    data: str | None = None,
    source: str | None = None,
    split: Literal["validation", "test"] = "validation",
    limit: int | None = None,
    columns: dict[str, str] | None = None,
    batch_size: int | None = None,
    json: str | None = None,
) -> None:
    """Compare adapters and their base on one data set, by the metrics of their task.

    Args:
        adapters: for each adapter its folder or that of its run, or NAME=FOLDER; all of one base and one task.
        config: a YAML with the data; by default the configuration of the first adapter's run.
        data: a class of data instead, such as TextClassification.
        source: rows instead: a file, a folder or a data set of the hub; of a file all rows.
        split: which rows of the data.
        limit: at most so many rows, and what is left of the last batch.
        columns: names of the rows' columns by ours, where they differ: '{text: review}'.
        batch_size: rows per batch.
        json: a file to write all figures to.
        opening: the base, and what is allowed.
    """
    from peftlight.console import say
    from peftlight.errors import UserError
    from peftlight.files import write_text
    from peftlight.on_data.at_work import open_on_data, quiet
    from peftlight.on_data.chosen_data import Choice
    from peftlight.on_data.comparing import Comparison, compare

    if limit is not None and limit < 1:
        raise UserError(f"--limit is a number of rows, at least 1; it is {limit}.")
    with quiet():
        choice = Choice(split, data, source, batch_size, columns)
        on = open_on_data(adapters, choice, config, opening)
        comparison: Comparison = compare(on, split, limit)
    say(comparison.table())
    for note in comparison.notes():
        say(note)
    if json is not None:
        write_text(json, comparison.as_json())
