"""The card of a merged model, from its certificate."""

from collections.abc import Iterator, Mapping
from typing import Any

from peftlight.handover.markdown import as_yaml, code, table
from peftlight.handover.model_card import PIPELINES, signed
from peftlight.handover.public_names import is_hub_id, is_public, last_part
from peftlight.handover.serving import architecture_of


def merged_card(certificate: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """The card's text, the same for the same files.

    Args:
        certificate: what `merge.json` holds.
        config: the model's `config.json`.
    """
    base = str(certificate["base"].get("name") or "an unknown base")
    method = str(certificate["adapter"]["strategy"]["class_path"]).rpartition(".")[2]
    shown = code(base if is_public(base) else last_part(base))
    gap = certificate["difference"]
    rows = [(name, f"{gap[name]:.3g}") for name in sorted(gap) if isinstance(gap[name], int | float)]
    parts = [
        f"---\n{as_yaml(dict(_front(base, method, config)))}---",
        f"# {shown} with a {method} merged into it",
        f"A plain model for transformers, in {certificate['dtype']}, written by `peftlight merge`.",
        "## Proof",
        f"The written model was compared with base and adapter on probes: {certificate['verdict']} of "
        f"{certificate['tolerance']:g} of the largest score. `merge.json` has the probes, and the hashes of what went "
        "in and of what was written.",
        table(("difference", "value"), rows),
    ]
    return signed("\n\n".join(parts) + "\n\n")


def _front(base: str, method: str, config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    if is_hub_id(base):
        yield "base_model", base
        yield "base_model_relation", "finetune"
    yield "library_name", "transformers"
    made = architecture_of(config)
    if pipeline := next((word for kind, word in PIPELINES.items() if made.endswith(_ending(kind))), None):
        yield "pipeline_tag", pipeline
    yield "tags", ["peftlight", method.lower()]


def _ending(auto_class: str) -> str:
    """How the names of the classes end that an auto class of transformers makes."""
    return auto_class.removeprefix("AutoModel")
