"""`peftlight combine`: one adapter of several."""

from typing import TYPE_CHECKING, Any, Literal

from peftlight.opening import Opening

if TYPE_CHECKING:
    from collections.abc import Sequence

    from peftlight.combine import Combination
    from peftlight.opened import Opened


def combine(
    adapters: list[str],
    out: str,
    opening: Opening,
    method: Literal["sum", "svd", "ties", "dare"] = "sum",
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
    heads_from: str | None = None,
) -> None:
    """Make one adapter of several of the same base, weighted: FOLDER:0.7 FOLDER:0.3 OUT.

    Methods: sum, the exact sum of the weighted changes, whose rank is the sum of theirs; svd, the nearest to it of a
    rank; ties (trim, elect a sign, average) and dare (drop at random, scale up), then the nearest of a rank.

    Args:
        adapters: folders of adapters or of their runs, or NAME=FOLDER; each with :WEIGHT behind it, or with weight 1.
        out: folder of the new adapter; new or empty.
        method: sum, svd, ties or dare.
        rank: of each module's change with svd, ties and dare; by default the largest that the adapters have there.
        density: share of each change's numbers that ties (by default 0.2) and dare (0.5) keep.
        seed: of what dare drops.
        heads_from: name of the adapter whose head the new one gets, if several bring one.
        opening: the base, and what is allowed.
    """
    from pathlib import Path

    from peftlight.combine import combine as combined
    from peftlight.console import say
    from peftlight.errors import UserError
    from peftlight.interop import save_adapter
    from peftlight.opened import open_adapters

    if Path(out).exists() and (not Path(out).is_dir() or any(Path(out).iterdir())):
        raise UserError(f"{out}, the last word, is the new adapter's folder; it is there and not empty. Name another.")
    words, weights = zip(*map(_parted, adapters), strict=True)
    opened = open_adapters(words, opening)
    found = combined(
        list(opened.adapters), weights, method, rank=rank, density=density, seed=seed, heads_from=heads_from
    )
    how = {"method": method, "rank": rank, "density": density, "seed": seed if method == "dare" else None}
    save_adapter(found.adapter, out, _record(opened, weights, how, heads_from))
    if found.errors:
        say(_table(opened.adapters.names, weights, found))
    say(f"\nwritten to {out}; to see it: peftlight inspect {out}")


def _parted(word: str) -> tuple[str, float]:
    """The adapter and its weight."""
    import math
    from contextlib import suppress
    from pathlib import Path

    from peftlight.errors import UserError

    folder, mark, tail = word.rpartition(":")
    if not mark or Path(word).exists():
        return word, 1.0
    with suppress(ValueError):
        if math.isfinite(weight := float(tail)):
            return folder, weight
    raise UserError(f"{word!r} ends in {tail!r}; expected a folder and, after a colon, a finite weight: {folder}:0.5")


def _record(
    opened: "Opened", weights: "Sequence[float]", how: dict[str, Any], heads_from: str | None
) -> dict[str, Any]:
    """What is known of the new adapter: the base, the classes of the head, and what it is made of."""
    records = opened.records
    head = records[heads_from] if heads_from else next((r for r in records.values() if r.label_names), None)
    names = opened.adapters.names
    tasks = {record.task: record.defined_in or {} for record in records.values() if record.task}
    task = next(iter(tasks), "")
    made_of = [
        {"name": name, "weight": weight, "sha256": records[name].sha256, "data": records[name].data}
        for name, weight in zip(names, weights, strict=True)
    ]
    return {
        "base": {
            "name": opened.source.name,
            "revision": opened.source.revision,
            "auto_class": opened.auto_class,
        },
        "task": task or None,
        "defined_in": {path: file for path, file in tasks.get(task, {}).items() if path == task},
        "label_names": head.label_names if head else None,
        "combined": {**{name: value for name, value in how.items() if value is not None}, "adapters": made_of},
    }


def _table(names: "Sequence[str]", weights: "Sequence[float]", found: "Combination") -> Any:
    """Ranks and errors by kind of module."""
    from statistics import fmean

    from peftlight.measuring.measured import starred
    from peftlight.measuring.tables import table_of_figures

    groups: dict[str, list[tuple[int, float]]] = {}
    for site, error in found.errors.items():
        rank = len(found.adapter.sites[site].get_parameter("A")) if site in found.adapter.sites else 0
        groups.setdefault(starred(site), []).append((rank, error))
    rows = [
        (name, len(each), max(rank for rank, _ in each), fmean(error for _, error in each), max(e for _, e in each))
        for name, each in groups.items()
    ]
    title = " + ".join(f"{weight:g} {name}" for name, weight in zip(names, weights, strict=True))
    return table_of_figures(title, ("", "modules", "largest rank", "error", "largest error"), rows)
