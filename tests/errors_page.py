"""docs/errors.md: what every bad input is answered; `HF_HUB_OFFLINE=1 python tests/errors_page.py` writes it."""

import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

from bad_inputs import adapters, configuration, data, environment, models
from bad_inputs.row import Row

DOCUMENT = Path(__file__).parents[1] / "docs" / "errors.md"
PYTHON = (3, 11)
"""The version with which the page is written; others word some errors differently."""
SECTIONS = {
    "The command": configuration.COMMAND,
    "Files of the configuration": configuration.FILES,
    "Keys": configuration.KEYS,
    "Classes": configuration.CLASSES,
    "Values": configuration.VALUES,
    "Files of data": data.FILES,
    "Rows": data.ROWS_OF_TEXT,
    "Images": data.IMAGES,
    "Names of models": models.NAMES,
    "Damaged models": models.DAMAGED,
    "Models and tasks": models.TASKS,
    "Names of adapters": adapters.NAMES,
    "Damaged adapters": adapters.FILES,
    "What adapters hold": adapters.CONTENTS,
    "Classes of your own": adapters.OWN_CLASSES,
    "Adapters and bases": adapters.BASES,
    "Places": environment.PLACES,
    "Packages": environment.PACKAGES,
    "Processes": environment.PROCESSES,
    "Network": environment.NETWORK,
    "Checkpoints": environment.CHECKPOINTS,
}
"""The rows by what they are about."""
ROWS = {(section, row.name): row for section, rows in SECTIONS.items() for row in rows}
_INTRODUCTION = """\
# What an error says

Written by `make tables` from what ran: a folder with small models, rows and a finished run, and in it one bad thing. A
message says what is wrong, where it stands, what was expected and what to do; the exit code is 2. `--traceback` shows
where in the code it happened, too. `tests/test_bad_inputs.py` runs every command again.
"""
_LONGEST_FILE = 400


def plain(message: str) -> str:
    """The message without what depends on the time, the machine, and the versions of libraries."""
    message = re.sub(r"\d{8}-\d{6}", "TIME", message)
    message = re.sub(r"\S+/site-packages/", "PACKAGES/", message)
    message = re.sub(r"Known: .*", "Known: ...", message)  # subclasses that other libraries bring are among them
    message = re.sub(r"(The cause: \w+): .*", r"\1: ...", message)
    return re.sub(r"0\.\d+", "0.…", message)


def documented() -> dict[tuple[str, str], str]:
    """The message of each row, as the page has it."""
    found: dict[tuple[str, str], str] = {}
    for section in re.split(r"^## ", DOCUMENT.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        title = section.partition("\n")[0]
        for entry in re.split(r"^### ", section, flags=re.MULTILINE)[1:]:
            *_, message, _ = re.split(r"^```\w*\n", entry, flags=re.MULTILINE)
            found[title, entry.partition("\n")[0]] = message.rstrip("\n")
    return found


def page(messages: Mapping[tuple[str, str], str]) -> str:
    """The whole page."""
    return "\n".join(_lines(messages)) + "\n"


def _lines(messages: Mapping[tuple[str, str], str]) -> Iterator[str]:
    yield _INTRODUCTION.rstrip("\n")
    for section, rows in SECTIONS.items():
        yield f"\n## {section}"
        for row in rows:
            yield from (f"\n### {row.name}\n", "```sh", f"peftlight {row.command}", "```", *_files(row))
            yield from ("```text", messages[section, row.name], "```")


def _files(row: Row) -> Iterator[str]:
    for name, content in row.files.items():
        if isinstance(content, str) and 0 < len(content) < _LONGEST_FILE:
            yield from (f"With {name}:", "", "```text", content.rstrip("\n"), "```")


def _write() -> None:
    from bad_inputs.kit import fill
    from bad_inputs.outcome import outcome, working_folder

    warnings.simplefilter("ignore")
    messages = {}
    with tempfile.TemporaryDirectory() as place:
        os.environ["PEFTLIGHT_CACHE"] = f"{place}/cache"
        with working_folder(None, Path(place) / "kit") as kit:
            fill(kit)
        for number, (key, row) in enumerate(ROWS.items()):
            with working_folder(kit, Path(place) / str(number)) as folder:
                messages[key] = plain(outcome(row, folder)[1])
    DOCUMENT.write_text(page(messages), encoding="utf-8")


if __name__ == "__main__":
    _write()
