"""Pictures of numbers by layer and kind of tensor."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftlight.errors import UserError
from peftlight.files import write_atomically
from peftlight.paths import place_of

Stacks = dict[str, dict[str, dict[int, float]]]
"""Numbers by stack, kind of tensor and layer."""


def draw_layers(panels: Mapping[str, Mapping[str, float]], title: str, picture: str, most: float | None = None) -> None:
    """Draw numbers as colours into a PNG: for each stack, layers from left to right and kinds of tensor downwards.

    What is in no stack (embeddings, heads) is drawn as a stack with one layer.

    Args:
        panels: by what the numbers say, numbers of at least 0 by the name of their tensor; a row of the picture each.
        title: of the whole picture.
        picture: the file to write.
        most: the number that has the brightest colour; none: in each row of the picture its largest.

    Raises:
        UserError: matplotlib is not installed, there is nothing to draw, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError('A picture needs matplotlib: pip install "peftlight[plots]"') from error
    rows = {says: _by_stack(values) for says, values in panels.items() if values}
    if not rows:
        raise UserError(f"There is nothing to draw into {picture}: no tensor has such numbers.")
    widths = {
        stack: 1 + max(map(max, kinds.values())) for by_stack in rows.values() for stack, kinds in by_stack.items()
    }
    heights = [max(map(len, by_stack.values())) for by_stack in rows.values()]
    size = (2 + sum(3 + 0.25 * width for width in widths.values()), 1 + sum(1 + 0.25 * height for height in heights))
    figure = Figure(figsize=size, layout="constrained")
    ratios = {"width_ratios": list(widths.values()), "height_ratios": heights}
    grid = figure.subplots(len(rows), len(widths), squeeze=False, gridspec_kw=ratios)
    for axes, (says, by_stack) in zip(grid, rows.items(), strict=True):
        brightest = most or max(panels[says].values()) or 1.0
        for each, (stack, width) in zip(axes, widths.items(), strict=True):
            image = _draw(each, stack, by_stack.get(stack, {}), width, brightest)
        figure.colorbar(image, ax=list(axes), label=says)
    figure.suptitle(title)
    write_atomically(Path(picture), lambda temporary: figure.savefig(temporary, format="png", dpi=110))


def _by_stack(values: Mapping[str, float]) -> Stacks:
    stacks: Stacks = {}
    for name, value in values.items():
        stack, layer = place_of(name) or ("", 0)
        kind = name.removeprefix(f"{stack}.{layer}.") if stack else name
        stacks.setdefault(stack, {}).setdefault(kind.removesuffix(".weight"), {})[layer] = value
    return stacks


def _draw(axes: Any, stack: str, kinds: Mapping[str, Mapping[int, float]], width: int, most: float) -> Any:
    cells = [[numbers.get(layer, float("nan")) for layer in range(width)] for numbers in kinds.values()]
    image = axes.imshow(cells or [[float("nan")] * width], vmin=0, vmax=most, cmap="viridis", aspect="auto")
    axes.set(yticks=range(len(kinds)), yticklabels=list(kinds), xticks=range(0, width, 1 + width // 16))
    axes.set(title=stack or "in no stack", xlabel="layer" if stack else None)
    return image
