"""The table that says, before the first step, what was adapted, what trains, its share and its bytes."""

from dataclasses import dataclass

from rich.table import Table
from torch import nn

from peftlight.coverage import Weights, share, uncovered
from peftlight.delta import CHILD, Delta
from peftlight.linear import numbers_in
from peftlight.paths import starred
from peftlight.shards import class_name
from peftlight.strategy import Adapter


@dataclass(frozen=True)
class Row:
    """Modules of one name, the layer's number aside, and what is trained on them."""

    modules: str
    count: int
    trained: str
    parameters: int
    size: int


def rows_of(adapter: Adapter) -> list[Row]:
    """One row for each module name, with the numbers of layers replaced by `*`."""
    sites: dict[str, tuple[list[str], list[nn.Parameter]]] = {}
    for name, parameter in adapter.parameters().items():
        site, how = _place(adapter, name)
        ways, owned = sites.setdefault(site, ([], []))
        ways += [how] if how not in ways else []
        owned.append(parameter)
    grouped: dict[tuple[str, str], list[list[nn.Parameter]]] = {}
    for site, (ways, owned) in sites.items():
        grouped.setdefault((starred(site), ", ".join(ways)), []).append(owned)
    return [_row(pattern, how, owned) for (pattern, how), owned in grouped.items()]


def without_delta(adapter: Adapter) -> list[Weights]:
    """The weight matrices that an adapter of layers' weights, LoRA say, leaves out and does not train in place either.

    Those that hold most come first. Nothing, where the adapter changes no layer's weight: a prefix, say.
    """
    sites = {site for site, delta in adapter.sites.items() if delta.folds}
    return uncovered(adapter.model, sites, adapter.parameters()) if sites else []


def table_of(adapter: Adapter) -> Table:
    """The rows as a table, with the trained share of the whole model in the last line.

    Below it stands what weight matrices no delta reaches.
    """
    rows, whole = rows_of(adapter), numbers_in(adapter.model)
    trained, size = sum(row.parameters for row in rows), sum(row.size for row in rows)
    table = Table(title=f"{type(adapter.strategy).__name__} on {class_name(adapter.model)}", title_justify="left")
    for column, justify in (("modules", "left"), ("count", "right"), ("trained", "left"), ("parameters", "right"),
                            ("bytes", "right")):  # fmt: skip
        table.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for row in rows:
        table.add_row(row.modules, str(row.count), row.trained, f"{row.parameters:,}", _bytes(row.size))
    table.add_section()
    for part in adapter.strategy.parts(adapter):
        own = list(part.parameters().values())
        number, memory = sum(p.numel() for p in own), sum(p.numel() * p.element_size() for p in own)
        percent = f"{number / whole:.2%} of {whole:,}"
        table.add_row(type(part.strategy).__name__, str(len(part.sites)), percent, f"{number:,}", _bytes(memory))
    count, percent = str(sum(row.count for row in rows)), f"{trained / whole:.2%} of {whole:,}"
    table.add_row("all that trains", count, percent, f"{trained:,}", _bytes(size), style="bold")
    if left := without_delta(adapter):
        table.caption, table.caption_justify = f"no delta on {share(left, adapter.model)}", "left"
    return table


def _place(adapter: Adapter, name: str) -> tuple[str, str]:
    """(module, how it is trained) of a parameter."""
    site, mark, within = f".{name}".rpartition(f".{CHILD}.{adapter.name}.")
    if mark:
        site = site.lstrip(".")
        return site, type(_innermost(adapter.sites[site], within)).__name__
    module, _, leaf = name.rpartition(".")
    return module, leaf


def _innermost(delta: Delta, within: str) -> Delta:
    """The delta that a parameter belongs to: of a stack's, the one of its own strategy."""
    child = getattr(delta, within.partition(".")[0])
    return child if isinstance(child, Delta) else delta


def _row(pattern: str, how: str, sites: list[list[nn.Parameter]]) -> Row:
    parameters = [p for owned in sites for p in owned]
    count, size = sum(p.numel() for p in parameters), sum(p.numel() * p.element_size() for p in parameters)
    return Row(pattern or "(the model)", len(sites), how, count, size)


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"
