"""A merge's certificate as a table."""

from collections.abc import Iterator

from rich.table import Table

from peftlight.merging.certificate import Certificate


def table_of(certificate: Certificate) -> Table:
    """The certificate's figures."""
    table = Table(title="base and adapter beside what was written", title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in _rows(certificate):
        table.add_row(*row)
    return table


def _rows(found: Certificate) -> Iterator[tuple[str, str]]:
    gap, base = found.difference, found.base
    at = f" at {base['revision']}" if base["revision"] else ""
    yield "base", f"{base['name']}{at}, {base['dtype']}"
    yield "method", str(found.adapter["strategy"]["class_path"]).rpartition(".")[2]
    yield "written in", found.dtype
    asked = f"{len(found.prompts)} prompts" if found.prompts else "images of noise"
    yield "asked", f"{asked}, {gap.places} places compared"
    yield "largest difference", f"{gap.largest:.3g}, {gap.relative:.2e} of the largest score {gap.scale:.4g}"
    yield "mean difference", f"{gap.mean:.3g}, {gap.relative_mean:.2e} of it"
    if gap.agreement is not None:
        yield "same best class", f"{gap.agreement:.2%}"
    if found.effect is not None:
        yield (
            "the adapter itself",
            f"moves scores by {found.effect.largest:.3g} at most, {found.effect.mean:.3g} on average",
        )
    if found.folding is not None:
        yield "folded, not yet rounded", f"outputs of each module within {found.folding:.1e} of those with its delta"
    if found.quantized is not None:
        gap = found.quantized
        yield (
            "from the quantized run",
            f"{gap.largest:.3g} at most, {gap.mean:.3g} on average, "
            + ("" if gap.agreement is None else f"{gap.agreement:.2%} the same best class"),
        )
    if found.changed is not None:
        yield "change of the weights", f"{found.changed:.2e} of the norm of what is changed"
    if found.lost:
        yield "lost to rounding", f"{found.lost:.2e} of the change"
    if found.untied:
        yield "no longer tied", ", ".join(found.untied)
    for remark in found.remarks:
        yield "note", remark
    yield "verdict", f"within the tolerance {found.tolerance:g}"
