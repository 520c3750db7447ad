"""Tables on the terminal: a title, a column of names, and columns of figures."""

from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from peftlight.errors import one_line


def table_of_figures(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """The first column holds names, the others figures; None is a dash, and a column of nothing else is left out.

    Names with the layer's number replaced by `*` stand together below the name of their stack.
    """
    cells = list(rows)
    known = [place for place in range(len(columns)) if not place or any(row[place] is not None for row in cells)]
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for place in known:
        table.add_column(columns[place], justify="right" if place else "left", overflow="fold", no_wrap=place > 0)
    stacks: dict[str, list[Sequence[object]]] = {}
    for row in cells:
        stacks.setdefault("".join(_parted(str(row[0]))[:2]), []).append(row)
    for stack, group in stacks.items():
        if stack:
            table.add_row(stack.removesuffix("."), style="bold")
        for row in group:
            name = f"{'  ' if stack else ''}{_parted(str(row[0]))[2]}"
            table.add_row(name, *(_shown(row[place]) for place in known[1:]))
    return table


def table_of_facts(title: str, rows: Iterable[Sequence[object]], columns: Sequence[str] = ("", "")) -> Table:
    """What it is, and what is known of it."""
    table = Table(title=title, title_justify="left", show_header=any(columns))
    for place, column in enumerate(columns):
        table.add_column(column, no_wrap=not place, overflow="fold")
    for row in rows:
        table.add_row(*map(_shown, row))
    return table


def _parted(name: str) -> tuple[str, str, str]:
    """The name up to the layer's number, this as `.*.`, and the rest; the rest alone for what is in no stack."""
    stack, mark, rest = name.partition(".*.")
    return (stack, mark, rest) if mark else ("", "", name)


def _shown(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.3g}" if isinstance(value, float) else one_line(str(value))
