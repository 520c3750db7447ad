"""How an adapter is used: commands and Python, for its card."""

import shlex
from collections.abc import Iterator

from peftlight.class_paths import NOTEBOOK
from peftlight.handover.markdown import block, code
from peftlight.handover.public_names import is_hub_id, is_public
from peftlight.interop.run_facts import RunFacts

_COMMANDS = {
    "AutoModelForCausalLM": 'peftlight generate ADAPTER --prompt "..."',
    "AutoModelForSeq2SeqLM": 'peftlight generate ADAPTER --prompt "..."',
}
_ROWS = "peftlight predict ADAPTER FILE"
_PROMPTS = {"PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"}
"""Types that HF PEFT computes by rules of its own where the model classifies."""


def usage(facts: RunFacts, base: str | None) -> Iterator[str]:
    """Paragraphs of Markdown; `base` is the base's name, which has to be one that others know too."""
    auto_class = facts.record.base.auto_class
    yield "`ADAPTER` stands for the folder of these files, or for the name of their repository on the hub."
    if base is None or not is_public(base):
        yield "The base is not known by a name that other machines know: give yours with `--base`."
    own = dict(sorted((facts.record.defined_in or {}).items()))
    if own:
        which = ", ".join(f"{code(path)} in {code(file)}" for path, file in own.items())
        yield f"It needs code that is not among these files, and that runs when it is imported: {which}."
    imports = "".join(f" --import {shlex.quote(file)}" for file in dict.fromkeys(own.values()) if file != NOTEBOOK)
    command = _COMMANDS.get(auto_class or "", _ROWS) if auto_class else "peftlight inspect ADAPTER"
    yield block("sh", command + imports)
    if base is None or auto_class is None or not is_public(base):
        return
    revision = facts.record.base.revision if base == facts.record.base.name else None
    # The base's own head may be for other classes; the adapter brings one.
    options = f", num_labels={len(facts.record.label_names)}" if facts.record.label_names else ""
    yield block("python", _ours(base, revision, auto_class, f"{options}, other_head=True" if options else ""))
    same = auto_class in _COMMANDS or str(facts.config.get("peft_type")) not in _PROMPTS
    if facts.read_by_peft and same and is_hub_id(base):
        yield "Without peftlight, in HF PEFT:"
        other = f"{options}, ignore_mismatched_sizes=True" if options else ""
        yield block("python", _theirs(base, revision, auto_class, other))


def _ours(base: str, revision: str | None, auto_class: str, options: str) -> str:
    source = f"Source({base!r}, {revision!r})" if revision else f"Source({base!r})"
    return f"""\
from peftlight import adapter_folder, load_adapter
from peftlight.pretrained import Source

model, _ = {source}.load_model({auto_class!r}{options})
load_adapter(model, adapter_folder("ADAPTER"))
model.eval()"""


def _theirs(base: str, revision: str | None, auto_class: str, options: str) -> str:
    pinned = f", revision={revision!r}" if revision else ""
    return f"""\
from peft import PeftModel
from transformers import {auto_class}

model = {auto_class}.from_pretrained({base!r}{pinned}{options})
model = PeftModel.from_pretrained(model, "ADAPTER")
model.eval()"""
