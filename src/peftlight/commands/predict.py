"""`peftlight predict ADAPTER FILE`: what an adapter says of the rows of a file."""

from peftlight.opening import Opening


def predict(
    adapter: str,
    file: str,
    opening: Opening,
    out: str | None = None,
    config: str | None = None,
    data: str | None = None,
    columns: dict[str, str] | None = None,
    batch_size: int | None = None,
) -> None:
    """Write predictions for the rows of a file: for each row one line of JSON with its number, from 0, as `id`.

    Args:
        adapter: its folder, or that of its run.
        file: rows as in the training, without their answers: json, jsonl, csv, tsv, parquet; or images in a folder.
        out: a file for the predictions; by default they are printed.
        config: a YAML that says how rows are read, instead of the configuration of the adapter's run.
        data: a class of data instead, such as TextClassification.
        columns: names of the rows' columns by ours, where they differ: '{text: review}'.
        batch_size: rows per batch.
        opening: the base, and what is allowed.
    """
    import sys
    from pathlib import Path

    from peftlight.callbacks.predictions import as_lines
    from peftlight.errors import UserError
    from peftlight.files import write_text
    from peftlight.on_data.at_work import open_on_data, predictions, quiet
    from peftlight.on_data.chosen_data import Choice

    if out is not None and Path(out).resolve() == Path(file).resolve():
        raise UserError(f"--out {out} is the file of the rows itself, which would be lost; choose another.")
    with quiet():
        choice = Choice("predict", data, file, batch_size, columns)
        on = open_on_data([adapter], choice, config, opening)
        records = predictions(on)
    if out is None:
        print(as_lines(records), end="", flush=True)
    else:
        write_text(out, as_lines(records))
        print(f"{len(records)} predictions: {out}", file=sys.stderr)
