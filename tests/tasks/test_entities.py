"""Entities in tags, against hand-made cases and a second way to find them; and their scores."""

import random
import re

import pytest
import torch

from peftlight.tasks.entities import EntityScores, entities, marks_entities

NAMES = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
LETTERS = {"O": ".", "B-PER": "P", "I-PER": "p", "B-LOC": "L", "I-LOC": "l"}


def by_pattern(tags: list[str]) -> set[tuple[int, int, str]]:
    """The definition as a pattern: an entity is B-X or else I-X, and all I-X behind it."""
    text = "".join(LETTERS[tag] for tag in tags)
    found = re.finditer("[Pp]p*|[Ll]l*", text)
    return {(match.start(), match.end(), {"P": "PER", "L": "LOC"}[match[0][0].upper()]) for match in found}


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("", set()),
        ("O O", set()),
        ("B-PER", {(0, 1, "PER")}),
        ("B-PER I-PER O B-LOC", {(0, 2, "PER"), (3, 4, "LOC")}),
        ("O B-PER I-PER", {(1, 3, "PER")}),
        ("B-PER B-PER I-PER", {(0, 1, "PER"), (1, 3, "PER")}),
        ("B-PER I-LOC", {(0, 1, "PER"), (1, 2, "LOC")}),
        ("I-PER I-PER O I-PER", {(0, 2, "PER"), (3, 4, "PER")}),
        ("I-PER I-LOC I-LOC", {(0, 1, "PER"), (1, 3, "LOC")}),
        ("I-PER B-PER", {(0, 1, "PER"), (1, 2, "PER")}),
        ("O I-LOC B-PER I-LOC O", {(1, 2, "LOC"), (2, 3, "PER"), (3, 4, "LOC")}),
    ],
)
def test_spans_and_types_are_those_of_the_definition(tags: str, expected: set[tuple[int, int, str]]) -> None:
    assert entities(tags.split()) == expected


def test_random_tags_hold_the_entities_that_a_pattern_finds() -> None:
    draw = random.Random(0)
    for _ in range(500):
        tags = draw.choices(NAMES, k=draw.randrange(12))
        assert entities(tags) == by_pattern(tags)


def test_a_type_may_hold_a_dash() -> None:
    assert entities(["B-work-of-art", "I-work-of-art"]) == {(0, 2, "work-of-art")}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (NAMES, True),
        (["O", "I-PER", "I-LOC"], True),
        (["B-NP", "I-NP"], True),
        (["O", "PER", "LOC"], False),
        (["O", "B-PER", "I-PER", "S-PER"], False),
        (["NOUN", "VERB"], False),
        (["O", "B-"], False),
        (["O"], False),
        ([], False),
    ],
)
def test_only_iob_and_io_names_mark_entities(names: list[str], expected: bool) -> None:
    assert marks_entities(names) == expected


def numbers(tags: str) -> list[int]:
    return [NAMES.index(tag) if tag != "-" else -100 for tag in tags.split()]


def test_scores_by_hand() -> None:
    """4 entities are there, 5 are guessed, 2 of those rightly; a piece without a label stands between two tags."""
    truth = ["B-PER - I-PER O B-LOC", "- B-LOC I-LOC O B-PER", "O O - - -"]
    guess = ["B-PER O I-PER O B-PER", "O B-LOC O O B-PER", "B-LOC O B-PER I-PER O"]
    scores = EntityScores(NAMES)
    for one, other in zip(guess, truth, strict=True):
        scores.update(torch.tensor([numbers(one)]), torch.tensor([numbers(other)]))
    found = {name: float(value) for name, value in scores.compute().items()}
    assert found == pytest.approx({"precision": 2 / 5, "recall": 2 / 4, "f1": 4 / 9})


def test_nothing_to_find_scores_nothing() -> None:
    scores = EntityScores(NAMES)
    scores.update(torch.tensor([[0, 0]]), torch.tensor([[0, 0]]))
    assert {float(value) for value in scores.compute().values()} == {0.0}
