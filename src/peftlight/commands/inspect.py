"""`peftlight inspect`: what an adapter is, and how far it moves each layer."""

from typing import TYPE_CHECKING

from peftlight.opening import Opening

if TYPE_CHECKING:
    from peftlight.interop.metadata import BaseRecord
    from peftlight.opened import Opened


def inspect(
    adapter: str,
    opening: Opening,
    files_only: bool = False,
    picture: str | None = None,
    json: str | None = None,
) -> None:
    """Say what an adapter is: method, base, size, training record, and how far it moves each layer.

    ‖ΔW‖ is the Frobenius norm of what the adapter changes in a weight W. The effective rank, the exponential of the
    entropy of the singular values' shares (Roy and Vetterli, 2007), says over how many directions that is spread.

    Args:
        adapter: folder of the adapter or of the run that trained it, or its name on the hub.
        files_only: whether to look at the adapter's files alone, without its base.
        picture: a PNG file for the changes by layer and kind of module.
        json: a file for all figures.
        opening: the base, and what is allowed.
    """
    from peftlight.console import say
    from peftlight.files import write_text
    from peftlight.handover.hub import adapter_folder
    from peftlight.interop.run_facts import run_facts
    from peftlight.measuring.inspected import as_json, changes_by, facts_of, in_file
    from peftlight.measuring.measured import Changes, kind_of, layer_of, measure
    from peftlight.measuring.pictures import draw_layers

    folder = adapter_folder(adapter)
    facts = run_facts(folder, opening.convert_pickle)
    say(facts_of(facts))
    opened = None if files_only else _opened(adapter, facts.record.base, opening)
    if opened is None:
        what, rows = "the tensors of the file", in_file(folder, opening.convert_pickle)
    else:
        what, rows = "what it changes", measure(Changes(next(iter(opened.adapters)), opened.new))
    say(changes_by(f"{what}, by kind", kind_of, rows))
    say(changes_by(f"{what}, by layer", layer_of, rows))
    if picture is not None:
        relative = {row.name: row.relative for row in rows if row.relative is not None}
        norms = {"norm": {row.name: row.norm for row in rows}}
        draw_layers({"‖ΔW‖ / ‖W‖": relative} if relative else norms, f"{facts.method}: {folder}", picture)
    if json is not None:
        write_text(json, as_json(adapter, facts, rows))


def _opened(adapter: str, named: "BaseRecord", opening: Opening) -> "Opened | None":
    """The adapter on its base; None where there is none to be had, which is said."""
    import sys

    from peftlight.errors import UserError
    from peftlight.opened import open_adapters
    from peftlight.pretrained import Source

    if opening.base is None:
        why = "it does not say which base it was trained on" if named.name is None else None
        try:
            source = Source(named.name or "", opening.revision or named.revision, opening.trust_remote_code)
            source.load_config() if not why else None
        except UserError as error:
            why = str(error)
        if why:
            print(f"The base is not there, so this is from the files alone: {why}\n  To give it: --base NAME",
                  file=sys.stderr)  # fmt: skip
            return None
    return open_adapters([adapter], opening)
