"""`peftlight diff`: two adapters of one base, layer by layer."""

from typing import TYPE_CHECKING

from peftlight.opening import Opening

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from rich.table import Table

    from peftlight.measuring.differing import Difference, Differences


def diff(
    one: str,
    two: str,
    opening: Opening,
    directions: int = 8,
    picture: str | None = None,
    json: str | None = None,
) -> None:
    """Compare two adapters of one base, layer by layer: what they were trained with, and where they move the weights.

    For what both change, means over tensors: the cosine of the two changes; their distance, relative to their own
    size (0 the same, 1.41 orthogonal, 2 opposite); how alike the spaces of outputs are that they write to, and those
    of inputs that they read (1 the same, 0 orthogonal), and what random spaces would have; the least angle of these.

    Args:
        one: folder of an adapter or of the run that trained it, its name on the hub, or NAME= and one of these.
        two: the other adapter.
        directions: of each change, the strongest so many directions make up its spaces.
        picture: a PNG file with cosines and spaces by layer and kind of module.
        json: a file for all figures, the principal angles among them.
        opening: the base, and what is allowed.
    """
    from peftlight.console import say
    from peftlight.errors import UserError
    from peftlight.files import write_text
    from peftlight.measuring.differing import differences, differing_settings
    from peftlight.measuring.measured import kind_of, layer_of
    from peftlight.measuring.tables import table_of_facts
    from peftlight.opened import open_adapters

    if directions < 1:
        raise UserError(f"--directions is a number from 1 up; it is {directions}.")
    opened = open_adapters([one, two], opening)
    (a, b), (first, second) = opened.adapters, opened.adapters.names
    records = opened.records
    settings = list(differing_settings((a, records[first]), (b, records[second])))
    rows = [(name, *map(_short, both)) for name, *both in settings]
    say(table_of_facts("trained with", rows, ("", first, second)))
    found = differences(a, b, opened.new, directions)
    if found.common:
        say(_table("changed by both, by kind", kind_of, found))
        say(_table("changed by both, by layer", layer_of, found))
    for line in _only(found, (first, second)):
        say(line)
    if picture is not None:
        _draw(found, f"{first} and {second}", picture)
    if json is not None:
        write_text(json, _as_json((first, second), settings, found))


def _short(value: "Any") -> object:
    """A setting's value, of a long list the beginning."""
    from peftlight.errors import listed

    if isinstance(value, dict):
        value = [f"{key}: {item}" for key, item in value.items()]
    return (listed(value, 4) or None) if isinstance(value, list) else value


def _table(title: str, by: "Callable[[Any], str]", found: "Differences") -> "Table":
    from peftlight.measuring.measured import together
    from peftlight.measuring.tables import table_of_figures

    columns = ("", "n", "cosine", "distance", "outputs", "inputs", "chance", "angle")
    return table_of_figures(title, columns, [_means(name, each) for name, each in together(found.common, by).items()])


def _means(name: str, rows: "list[Difference]") -> tuple[object, ...]:
    from peftlight.measuring.differing import mean_of

    outputs, inputs = [row.outputs for row in rows if row.outputs], [row.inputs for row in rows if row.inputs]
    means = (
        mean_of([row.cosine for row in rows]),
        mean_of([row.distance for row in rows]),
        mean_of([space.similarity for space in outputs]),
        mean_of([space.similarity for space in inputs]),
        mean_of([space.by_chance for space in [*outputs, *inputs]]),
    )
    angle = mean_of([space.degrees[0] for space in [*outputs, *inputs]])
    figures = [None if mean is None else f"{mean:.3f}" for mean in means]
    return (name, len(rows), *figures, None if angle is None else f"{angle:.1f}°")


def _only(found: "Differences", names: tuple[str, str]) -> "Iterator[str]":
    from collections import Counter

    from peftlight.errors import listed
    from peftlight.measuring.measured import starred

    for name, tensors in zip(names, found.only, strict=True):
        if tensors:
            kinds = [f"{kind} ({count})" for kind, count in Counter(map(starred, tensors)).items()]
            yield f"only {name} changes, or in another shape: {listed(kinds, 12)}"


def _draw(found: "Differences", title: str, picture: str) -> None:
    from peftlight.measuring.pictures import draw_layers

    panels = {
        "|cosine|": {row.name: abs(row.cosine) for row in found.common if row.cosine is not None},
        "outputs": {row.name: row.outputs.similarity for row in found.common if row.outputs},
        "inputs": {row.name: row.inputs.similarity for row in found.common if row.inputs},
    }
    draw_layers(panels, title, picture, most=1.0)


def _as_json(names: tuple[str, str], settings: "list[tuple[str, Any, Any]]", found: "Differences") -> str:
    import dataclasses
    import json

    content = {
        "adapters": names,
        "settings": {name: values for name, *values in settings},
        **dataclasses.asdict(found),
    }
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
