"""The card of an adapter: `README.md`, from what the run recorded. What is not known is not said."""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peftlight.files import write_text
from peftlight.handover.card_use import usage
from peftlight.handover.markdown import as_yaml, block, bullets, code, table
from peftlight.handover.public_names import is_hub_id, is_public, last_part, without_folders
from peftlight.interop.folder import find_adapter
from peftlight.interop.run_facts import RunFacts, run_facts

CARD = "README.md"
_MARK = re.compile(rb"<!-- written by peftlight from its records; sha256 of the text above: ([0-9a-f]{64}) -->\n")
PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForImageClassification": "image-classification",
    "CAUSAL_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
}
"""The hub's names of tasks, by transformers' and HF PEFT's; it has none for encoder-decoders in general."""
_STAGES = {"val_": "validation", "test_": "test"}
_LIMITS = """\
This card was written from the files of the training, and says what they say. Nothing was measured but what is listed;
fitness for a purpose, bias and safety were not examined. No licence is recorded: those of the base and of the data
apply beside that of the adapter."""
_OF_SPEED = re.compile(r"lr(-.*)?|tokens_per_second")
"""Logged values that say nothing about what the adapter does."""


def write_card(folder: str | Path) -> bool:
    """Write the card of the adapter in `folder`, unless a person has written or changed the one there.

    Returns:
        Whether it was written.

    Raises:
        UserError: there is no adapter, a file is damaged, or the card cannot be written.
    """
    folder = find_adapter(Path(folder))
    card = folder / CARD
    if card.exists() and not is_untouched(card.read_bytes()):
        return False
    write_text(card, model_card(folder))
    return True


def is_untouched(card: bytes) -> bool:
    """Whether the card is as `model_card` once made it: its last line has the checksum of all before."""
    text, _, last = card.rstrip(b"\n").rpartition(b"\n")
    mark = _MARK.fullmatch(last + b"\n")
    return mark is not None and mark[1].decode() == hashlib.sha256(text + b"\n").hexdigest()


def model_card(folder: str | Path, base: str | None = None) -> str:
    """The card's text, the same for the same files; `base` is the base's public name, if the record has another.

    Raises:
        UserError: there is no adapter, or a file is damaged.
    """
    facts = run_facts(folder)
    base = base or facts.record.base.name
    shown = "an unknown base" if base is None else code(base if is_public(base) else last_part(base))
    parts = [
        f"---\n{as_yaml(dict(_front(facts, base)))}---",
        f"# {facts.method} for {shown}",
        " ".join(_opening(facts, shown)),
        *_section("Training", bullets(_training(facts, base)), _settings(facts)),
        *_section("Measured", _measured(facts)),
        *_section("Audit", _audited(facts)),
        *_section("Size", _size(facts)),
        *_section("Use", *usage(facts, base)),
        *_section("Limits", _LIMITS),
    ]
    return signed("\n\n".join(parts) + "\n\n")


def signed(text: str) -> str:
    """The text with a last line that tells whether it was changed since."""
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f"{text}<!-- written by peftlight from its records; sha256 of the text above: {digest} -->\n"


def _front(facts: RunFacts, base: str | None) -> Iterator[tuple[str, Any]]:
    """What the hub reads; it refuses names that it does not know as ids."""
    if base and is_hub_id(base):
        yield "base_model", base
        yield "base_model_relation", "adapter"
    yield "library_name", "peft" if facts.read_by_peft else "peftlight"
    if pipeline := PIPELINES.get(facts.record.base.auto_class or str(facts.config.get("task_type"))):
        yield "pipeline_tag", pipeline
    yield "tags", ["peftlight", facts.method.lower()]
    source = (facts.record.data or {}).get("source")
    if isinstance(source, str) and "/" in source and is_hub_id(source):
        yield "datasets", [source]
    results = list(_results(facts, source if isinstance(source, str) else None))
    if pipeline and results:
        yield "metrics", sorted({metric["type"] for result in results for metric in result["metrics"]})
        yield "model-index", [{"name": facts.method, "results": [{"task": {"type": pipeline}, **r} for r in results]}]


def _results(facts: RunFacts, source: str | None) -> Iterator[dict[str, Any]]:
    """The measured values of each part of the data that nothing was trained on."""
    for prefix, split in _STAGES.items():
        values = {name.removeprefix(prefix): value for name, value in facts.metrics.items() if name.startswith(prefix)}
        if source and values:
            name = source if is_public(source) else last_part(source)
            yield {
                "dataset": {"type": name, "name": name, "split": split},
                "metrics": [{"type": metric, "value": _rounded(value)} for metric, value in values.items()],
            }


def _section(title: str, *parts: str | None) -> list[str]:
    """The heading and the parts, or nothing where all parts are missing."""
    there = [part for part in parts if part]
    return [f"## {title}", *there] if there else []


def _opening(facts: RunFacts, base: str) -> Iterator[str]:
    kind = "in HF PEFT's format" if facts.read_by_peft else "in peftlight's own format"
    yield f"An adapter {kind}: what {code(facts.method)} adds to {base}, without the base itself."
    if facts.run.get("state") in ("interrupted", "failed", "stopped by max_time"):
        yield f"Its training is recorded as {facts.run['state']}."


def _training(facts: RunFacts, base: str | None) -> Iterator[str]:
    record, run = facts.record, facts.run
    if base:
        yield f"base: {code(base if is_public(base) else last_part(base))}" + _pinned(facts, base)
    if record.base.dtype:
        yield f"the base's number format: {code(record.base.dtype)}"
    if record.base.weights:
        yield f"fingerprint of the base's frozen weights: {code(record.base.weights)}"
    if record.task:
        yield f"task: {code(record.task)}" + (f" ({code(record.base.auto_class)})" if record.base.auto_class else "")
    if record.label_names:
        yield f"classes, in order: {', '.join(map(code, record.label_names))}"
    yield from _data(facts)
    for name, value in (("optimizer steps", record.steps), ("seed", record.seed),
                        ("precision", run.get("precision")), ("processes", run.get("processes"))):  # fmt: skip
        if value is not None:
            yield f"{name}: {value}"
    if versions := run.get("versions") or record.versions:
        yield "versions: " + ", ".join(f"{name} {version}" for name, version in sorted(versions.items()) if version)


def _pinned(facts: RunFacts, base: str) -> str:
    same = facts.record.base.revision and base == facts.record.base.name
    return f", revision {code(facts.record.base.revision)}" if same else ""


def _data(facts: RunFacts) -> Iterator[str]:
    data = facts.record.data or {}
    if isinstance(source := data.get("source"), str):
        yield f"data: {code(source if is_public(source) else last_part(source))}"
    if fingerprint := data.get("fingerprint") or facts.run.get("data_fingerprint"):
        yield f"fingerprint of the data: {code(fingerprint)}"
    for split, counts in (facts.run.get("data") or {}).items():
        cut = f", {counts['truncated']} of them cut" if counts.get("truncated") else ""
        yield f"{split}: {counts.get('kept')} of {counts.get('rows')} rows{cut}, {counts.get('tokens')} tokens"


def _settings(facts: RunFacts) -> str | None:
    """The recipe as the configuration had it; of an adapter without one, as its record has it."""
    strategy = facts.settings_of("model").get("strategy") or facts.record.trained_by or facts.record.strategy
    recipe = {
        "strategy": strategy,
        **{part: facts.settings.get(part) for part in ("optimizer", "lr_scheduler")},
        **{name: facts.settings_of("data").get(name) for name in ("batch_size", "max_length")},
        **{name: (facts.settings.get("trainer") or {}).get(name) for name in
           ("max_epochs", "accumulate_grad_batches", "gradient_clip_val")},
    }  # fmt: skip
    known = _without_unset(without_folders(recipe))
    return block("yaml", as_yaml(known)) if known else None


def _without_unset(value: Any) -> Any:
    """The plain data without the entries that say nothing."""
    if not isinstance(value, dict):
        return value
    entries = {key: _without_unset(item) for key, item in value.items()}
    return {key: item for key, item in entries.items() if item not in (None, [], {})}


def _measured(facts: RunFacts) -> str | None:
    rows = [(name, f"{value:.6g}") for name, value in facts.metrics.items() if not _OF_SPEED.fullmatch(name)]
    return "As last logged in the training:\n\n" + table(("metric", "value"), rows) if rows else None


def _audited(facts: RunFacts) -> str | None:
    audit = facts.run.get("audit")
    if not audit:
        return None
    moved = sum(tensor["moved"] for tensor in audit["trained"])
    moving = f"{moved} of {len(audit['trained'])} trained tensors moved"
    return (
        f"{moving}; the frozen base has the checksum that it had before the training ({code(audit['base_checksum'])})."
    )


def _size(facts: RunFacts) -> str:
    total = f"{facts.parameters:,} values in {facts.size:,} bytes"
    rows = [(row["modules"], row["count"], row["trained"], f"{row['parameters']:,}")
            for row in facts.run.get("trained") or []]  # fmt: skip
    return f"{total}.\n\n{table(('trained', 'modules', 'as', 'values'), rows)}" if rows else f"{total}."


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
