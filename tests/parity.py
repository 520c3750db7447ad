"""The table of parity: how far each method is from its independent truth. `python tests/parity.py` writes it.

Each figure is the largest relative error, in float32, over the outputs, the gradients and the losses of 20 AdamW steps,
on a tiny model of the architecture; the functions are those that the tests of the methods call.
"""

import logging
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

from models import MODELS
from peftlight.errors import UserError
from strategies import (
    test_adalora,
    test_bottleneck,
    test_compacter,
    test_hyperlora,
    test_ia3,
    test_in_place,
    test_layer_norm,
    test_lora_against_peft,
    test_lora_family,
    test_p_tuning,
    test_prefix,
    test_prompt,
    test_trainable_tokens,
    test_vera,
)

DOCUMENT = Path(__file__).parents[1] / "docs" / "parity.md"
PEFT, EQUATION, BY_HAND = "HF PEFT 0.21", "the paper's equation", "plain training by hand"
METHODS: dict[str, tuple[str, Callable[[str], dict[str, float]]]] = {
    "LoRA": (PEFT, test_lora_against_peft.parity),
    "rsLoRA": (PEFT, test_lora_family.parity_rslora),
    "DoRA": (PEFT, test_lora_family.parity_dora),
    "PiSSA": (PEFT, test_lora_family.parity_pissa),
    "OLoRA": (PEFT, test_lora_family.parity_olora),
    "VeRA": (PEFT, test_vera.parity),
    "AdaLoRA": (PEFT, test_adalora.parity),
    "IA³": (PEFT, test_ia3.parity),
    "LayerNorm tuning": (PEFT, test_layer_norm.parity),
    "trainable tokens": (PEFT, test_trainable_tokens.parity),
    "prefix tuning": (f"{PEFT}, compat", test_prefix.parity),
    "prefix tuning, projected": (f"{PEFT}, compat", test_prefix.parity_projected),
    "prompt tuning": (f"{PEFT}, compat", test_prompt.parity),
    "P-tuning, MLP": (f"{PEFT}, compat", test_p_tuning.parity),
    "P-tuning, LSTM": (f"{PEFT}, compat", test_p_tuning.parity_lstm),
    "Houlsby's adapters": (EQUATION, test_bottleneck.parity_houlsby),
    "Pfeiffer's adapters": (EQUATION, test_bottleneck.parity_pfeiffer),
    "parallel adapters": (EQUATION, test_bottleneck.parity_parallel),
    "Compacter": (EQUATION, test_compacter.parity),
    "HyperLoRA": (EQUATION, test_hyperlora.parity),
    "BitFit": (BY_HAND, partial(test_in_place.parity, "bitfit")),
    "full fine-tuning": (BY_HAND, partial(test_in_place.parity, "full")),
}
_INTRODUCTION = """# Parity

Written by `make tables`. The largest relative error in float32 over outputs, gradients and the losses of 20 AdamW
steps, on tiny models; the tests hold 1e-5. A dash: the other side cannot do it, or the method does not serve the
architecture. EVA's start depends on data and is compared with a decomposition of all activations at once, in its own
test; LoRA+ is two learning rates. HyperLoRA is compared in float64: its network amplifies what float32 rounds.
"""
_QUIRKS: list[tuple[str, str, str]] = [
    ("prefix tuning", "real tokens are numbered from the prefix's length on; the usable length shrinks",
     "positions stay"),
    ("prefix tuning on T5", "the decoder alone; layer i reads slots 4i and 4i + 1 mod 2L, so half may be unused",
     "encoder and decoder, a prefix in each layer"),
    ("prompt tuning, P-tuning", "outputs are longer by the virtual tokens; BERT pools the first of them; padded "
     "positions are counted", "the user's length, the real first token, real tokens counted"),
    ("prompt tuning on T5", "twice the parameters, of which half gets no gradient", "one prompt, before the encoder"),
    ("OLoRA on GPT-2", "matrices of swapped shapes, an error", "works"),
    ("PiSSA, OLoRA", "the base's weight is rewritten, and decomposed again at every load",
     "the base stays; saved as plain LoRA"),
    ("AdaLoRA", "a threshold, so that ties may miss the budget; without `task_type` no penalty",
     "ranks by order, the budget exactly; the penalty always"),
    ("IA³", "`feedforward_modules` may end in the middle of a name: BERT's attention output counts as feed-forward",
     "by structure, or by whole names"),
    ("EVA with rsLoRA", "a layer's scale changes when its rank does", "it stays"),
    ("all", "a pattern that matches nothing is passed over", "an error with the nearest name"),
]  # fmt: skip
_BEFORE_QUIRKS = """
## Where HF PEFT differs

What peftlight does by default, and what was met while comparing. `compat: peft` on prefix tuning, prompt tuning and
P-tuning gives HF PEFT's numbers.

| method | HF PEFT 0.21 | peftlight |
| --- | --- | --- |
"""


def measured(method: str, architecture: str) -> float | None:
    """The largest error of a method on an architecture; None where there is nothing to compare."""
    try:
        return max(METHODS[method][1](architecture).values())
    except (KeyError, UserError, RuntimeError) as error:
        logging.getLogger(__name__).info("%s on %s: %s", method, architecture, error)
        return None


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    lines = [f"| method | beside | {' | '.join(MODELS)} |", "| --- | --- |" + " --- |" * len(MODELS)]
    for method, (truth, _) in METHODS.items():
        errors = [measured(method, architecture) for architecture in MODELS]
        cells = ["-" if error is None else f"{error:.0e}" for error in errors]
        lines.append(f"| {method} | {truth} | {' | '.join(cells)} |")
        print(lines[-1], file=sys.stderr, flush=True)
    quirks = "".join(f"| {' | '.join(quirk)} |\n" for quirk in _QUIRKS)
    DOCUMENT.write_text("\n".join([_INTRODUCTION, *lines, _BEFORE_QUIRKS]) + quirks, encoding="utf-8")


if __name__ == "__main__":
    main()
