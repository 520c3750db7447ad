"""Curves of a run's metrics, drawn from its metrics.csv."""

import csv
from pathlib import Path

from peftlight.errors import UserError
from peftlight.files import write_atomically

Series = dict[str, list[tuple[int, float]]]


def draw_curves(metrics: Path, picture: Path) -> None:
    """Draw losses, scores and the learning rate of `metrics` (a metrics.csv) over the steps into `picture`.

    Raises:
        UserError: matplotlib is not installed, or the picture cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError('curves.png needs matplotlib: pip install "peftlight[plots]"') from error
    panels = _panels(_read(metrics))
    figure = Figure(figsize=(5 * len(panels), 3.5), layout="constrained")
    for axes, (title, series) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for name, points in series.items():
            axes.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 30 else None)
        axes.set(title=title, xlabel="optimizer step")
        axes.legend()
    write_atomically(picture, lambda temporary: figure.savefig(temporary, format="png", dpi=110))


def _read(metrics: Path) -> Series:
    series: Series = {}
    with open(metrics, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for name, cell in row.items():
                if cell and name not in ("step", "epoch"):
                    series.setdefault(name, []).append((int(row["step"]), float(cell)))
    return series


def _panels(series: Series) -> dict[str, Series]:
    kinds = {
        "loss": lambda name: name.endswith("_loss"),
        "scores": lambda name: name.endswith(("_accuracy", "_f1", "_perplexity")),
        "learning rate": lambda name: name == "lr",
    }
    chosen = {title: {n: p for n, p in series.items() if belongs(n)} for title, belongs in kinds.items()}
    return {title: found for title, found in chosen.items() if found} or {"metrics": series}
