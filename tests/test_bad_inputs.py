"""Every bad input is answered with a message that a person can act on, which docs/errors.md shows, and with code 2."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import peftlight
from bad_inputs.kit import fill
from bad_inputs.outcome import outcome, working_folder
from errors_page import DOCUMENT, PYTHON, ROWS, documented, page, plain
from peftlight import class_paths
from peftlight.config_errors import places
from requirements import as_pinned, direct, needed
from tasks.small import QUIET

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore")]
_MOST_LINES = 25
_NOISE = ("Traceback", "unexpected error", "\x1b", "NestedArg", "<class '", "Parser key", "Weights only load")


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with working_folder(None, tmp_path_factory.mktemp("kit") / "kit") as folder:
        fill(folder)
    return folder


@pytest.fixture(scope="module")
def pinned() -> bool:
    """Whether the libraries, and Python, are those that the page was written with."""
    return sys.version_info[:2] == PYTHON and as_pinned(needed(direct()))


@pytest.fixture(autouse=True)
def no_classes_of_other_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages list all classes that are imported, and other tests and the documentation's examples define some."""
    every, of_files = places._subclasses, class_paths.below
    installed = {Path(peftlight.__file__).parent, Path(torch.__file__).parents[1]}

    def without(kind: type) -> Iterator[type]:
        return (child for child in every(kind) if installed & {*Path(_file_of(child)).parents})

    def below(parent: type) -> Iterator[type]:
        return (child for child in of_files(parent) if installed & {*Path(_file_of(child)).parents})

    monkeypatch.setattr(places, "_subclasses", without)
    monkeypatch.setattr(class_paths, "below", below)


def _file_of(kind: type) -> str:
    return getattr(sys.modules.get(kind.__module__), "__file__", None) or ""


@pytest.mark.parametrize("key", ROWS, ids=": ".join)
def test_a_bad_input_is_refused_as_the_page_says(key: tuple[str, str], kit: Path, tmp_path: Path, pinned: bool) -> None:
    row = ROWS[key]
    with working_folder(kit, tmp_path / "work") as folder:
        code, message = outcome(row, folder)
        assert not (folder / "it_ran").exists(), "code of the input ran"
    assert code == 2
    assert len(message.splitlines()) <= _MOST_LINES
    assert not [noise for noise in _NOISE if noise in message], message
    assert not [part for part in row.says if part not in message], message
    if pinned:  # others may word what the messages pass on differently
        assert plain(message) == documented()[key]


def test_the_page_has_every_row_and_no_other() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == page(documented())
    assert len(ROWS) >= 110
