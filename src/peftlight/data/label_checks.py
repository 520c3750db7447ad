"""Whether the labels that stand in the rows are classes; what is rather scores, ids, lists or a mistake is refused."""

import difflib
import re
import unicodedata
from collections.abc import Callable

from peftlight.data.cells import shown
from peftlight.data.found_labels import MANY_ROWS, FoundLabels, Label, number_of
from peftlight.errors import UserError, listed

_FEW_ROWS = 10
"""Of fewer rows nothing is said about how often labels come."""
_MANY = 20
"""More different numbers than this are scores or ids, unless they count from 0 or 1."""
_OFTEN = 10
"""A label of one row stands out where every other has as many rows."""
_ALIKE = 0.8
_DATE = re.compile(r"\d{4}-\d\d?-\d\d?([T ].*)?|\d\d?[./-]\d\d?[./-]\d{2,4}([T ].*)?")
_LIST = re.compile(r"\[(.*['\",].*)?\]|\{.*['\",].*\}", re.DOTALL)
_MISSING = {"nan", "null", "<na>", "#n/a"}
_SIGNS = (",", ";", "|")


def check_classes(found: FoundLabels, of_words: bool = False) -> None:
    """See that each label is a class.

    Args:
        found: the labels of the training split, of which none were named by the user.
        of_words: whether a row is a word, so that some labels are rare, and many rows alike.

    Raises:
        UserError: with the row, the counts, and the option that makes every label a class all the same.
    """
    of_rows = () if of_words else (_joined, _dates, _unique, _stray)
    checks: tuple[Callable[[FoundLabels], str], ...] = (
        *of_rows[:1], _fractions, _missing, _spellings, _misspelt, _below_zero, *of_rows[1:], _gaps
    )  # fmt: skip
    for check in checks:
        if problem := check(found):
            raise UserError(f"{problem} If each of them is a class all the same, name them in order: {found.option()}")


def _cut(label: Label) -> str:
    text = repr(label)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _fractions(found: FoundLabels) -> str:
    """Scores: numbers with a fraction."""
    numbers = {label: number for label in found.counts if (number := number_of(label)) is not None}
    broken = [label for label, number in numbers.items() if not number.is_integer()]
    if not broken:
        return ""
    held = (
        f"{len(numbers)} different numbers in {sum(found.counts[label] for label in numbers):,} of {found.rows:,} rows"
    )
    return (
        f"{found.where(broken[0])}: the label in {found.column!r} is {shown(numbers[broken[0]])}; expected an integer "
        f"or a name. There are {held}: scores, not classes."
    )


def _missing(found: FoundLabels) -> str:
    """What programs write where a value is missing."""
    marks = [label for label in found.counts if isinstance(label, str) and label.lower() in _MISSING]
    if not marks or len(marks) == len(found.counts):
        return ""
    count = sum(found.counts[mark] for mark in marks)
    return (
        f"{found.where(marks[0])}: the label in {found.column!r} is {marks[0]!r}, which stands for a missing value, as "
        f"in {count:,} of {found.rows:,} rows. Give these rows a label, or remove them."
    )


def _spellings(found: FoundLabels) -> str:
    """One label in several spellings."""
    by_key: dict[str, list[str]] = {}
    for label in found.counts:
        if isinstance(label, str):
            by_key.setdefault(" ".join(unicodedata.normalize("NFKC", label).casefold().split()), []).append(label)
    for spellings in by_key.values():
        if len(spellings) > 1:
            spellings.sort(key=lambda label: found.counts[label])
            each = listed(f"{label!r} ({found.counts[label]:,})" for label in spellings)
            return f"{found.where(spellings[0])}: {each} differ in case or spaces alone. Write them in one way."
    return ""


def _misspelt(found: FoundLabels) -> str:
    """A label of one row that is almost another of many."""
    often = [label for label, count in found.counts.items() if count >= _OFTEN and isinstance(label, str)]
    for label in found.rare:
        for other in often:
            if isinstance(label, str) and _is_almost(label, other):
                return (
                    f"{found.where(label)}: the label is {label!r}, once in {found.rows:,} rows; probably a mistake. "
                    f"Did you mean {other!r} ({found.counts[other]:,} rows)?"
                )
    return ""


def _is_almost(label: str, other: str) -> bool:
    """Whether they differ in a letter or two; names that differ in their numbers are meant to."""
    if min(len(label), len(other)) < 4 or re.sub(r"\d+", "", label) == re.sub(r"\d+", "", other):
        return False
    if abs(len(label) - len(other)) > 2:
        return False
    return difflib.SequenceMatcher(None, label.casefold(), other.casefold()).ratio() >= _ALIKE


def _joined(found: FoundLabels) -> str:
    """Several labels in a cell, with a separator between them or as a list."""
    names = [label for label in found.counts if isinstance(label, str)]
    lists = [name for name in names if _LIST.fullmatch(name)]
    joined = lists if 2 * sum(found.counts[name] for name in lists) > found.rows else _of_known_parts(found, names)
    if not joined:
        return ""
    count = sum(found.counts[name] for name in joined)
    return (
        f"{found.where(joined[0])}: the label {_cut(joined[0])} is several in one cell, as in {count:,} of "
        f"{found.rows:,} rows. One label a row is expected: keep the rows of one label, or make a file of 0 and 1 for "
        "each label."
    )


def _of_known_parts(found: FoundLabels, names: list[str]) -> list[str]:
    """The names whose parts are labels of other rows, alone or beside others."""
    alone = {str(label).casefold() for label in found.counts}
    parts = {name: cut for name in names if len(cut := _parts(name)) > 1}
    holders: dict[str, set[frozenset[str]]] = {}
    for cut in parts.values():
        for part in cut:
            holders.setdefault(part, set()).add(frozenset(cut))
    return [
        name for name, cut in parts.items() if all(part in alone or len(holders[part]) > 1 for part in cut)
        and all(cut)
    ]  # fmt: skip


def _parts(name: str) -> list[str]:
    for sign in _SIGNS:
        if sign in name:
            return [part.strip().casefold() for part in name.split(sign)]
    return [name]


def _below_zero(found: FoundLabels) -> str:
    """-1 stands for an unknown label on the hub; beside 1 alone it is a class."""
    if not found.numbers or found.numbers[0] >= 0 or (found.are_numbers and found.numbers == [-1, 1]):
        return ""
    lowest = found.numbers[0]
    return (
        f"{found.where(lowest)}: the label {lowest} is outside the range; labels count from 0, and -1 is written where "
        f"a label is unknown. The labels are {found.told()}."
    )


def _dates(found: FoundLabels) -> str:
    names = [label for label in found.counts if isinstance(label, str) and _DATE.fullmatch(label)]
    if len(names) < len(found.counts):
        return ""
    return (
        f"{found.where(names[0])}: the label in {found.column!r} is {names[0]!r}: the labels are dates, "
        f"{len(names)} different ones in {found.rows:,} rows."
    )


def _unique(found: FoundLabels) -> str:
    """Ids, names of people, free text: nearly every row has another."""
    if found.rows < _FEW_ROWS or len(found.counts) < _FEW_ROWS or 2 * len(found.rare) < found.rows:
        return ""
    what = "numbers" if found.are_numbers else "texts or ids"
    return (
        f"{found.where(found.rare[0])}: the label in {found.column!r} is {_cut(found.rare[0])}; {len(found.counts)} "
        f"different values in {found.rows:,} rows, {len(found.rare):,} of them in one row alone: they are {what}, not "
        "classes."
    )


def _stray(found: FoundLabels) -> str:
    """A label of one row among few that are common, or one that leaves a gap in the numbers."""
    for label in sorted(found.counts, key=lambda label: found.counts[label]):
        if len(found.counts) > 2 and (_leaves_a_gap(found, label) or _stands_out(found, label)):
            count = found.counts[label]
            times = "once" if count == 1 else f"{count} times"
            return (
                f"{found.where(label)}: the label is {label!r}, {times} in {found.rows:,} rows; probably a mistake. "
                f"The labels are {listed(found.names)}; rows of each: {listed(found.sizes)}."
            )
    return ""


def _leaves_a_gap(found: FoundLabels, label: Label) -> bool:
    """Whether the label is rare, and the numbers were whole without it."""
    rare = found.counts[label] <= max(1, found.rows // 1000)
    rest = [number for number in found.numbers if number != label]
    return found.are_numbers and rare and not _is_whole(found.numbers) and _is_whole(rest)


def _stands_out(found: FoundLabels, label: Label) -> bool:
    """Whether it is a label of one row among few common ones; of stars and other grades one may be that rare."""
    if found.counts[label] > 1 or found.rows < MANY_ROWS or len(found.counts) > _FEW_ROWS:
        return False
    if found.are_numbers and _is_whole(found.numbers) and len(found.numbers) > 3:
        return False
    return all(count >= _OFTEN for other, count in found.counts.items() if other != label)


def _is_whole(numbers: list[int]) -> bool:
    return numbers == list(range(numbers[0], numbers[-1] + 1))


def _gaps(found: FoundLabels) -> str:
    """Numbers that skip some are classes where they are few and each is common; else they are ids or scores."""
    if not found.are_numbers or _is_whole(found.numbers) or found.numbers == [-1, 1]:
        return ""
    least = min(found.counts, key=lambda label: (found.counts[label], label))
    if len(found.numbers) <= _MANY and found.counts[least] > 1:
        return ""
    return (
        f"{found.where(least)}: the label is {least}, in {found.counts[least]:,} of {found.rows:,} rows. The labels "
        f"are {listed(found.numbers)}: {len(found.numbers)} different numbers that skip some, as scores or ids do."
    )
