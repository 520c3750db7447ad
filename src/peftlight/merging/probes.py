"""Inputs on which two models are compared, and how far apart their scores are."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from peftlight.errors import UserError, listed
from peftlight.paths import own_parameters

PROMPTS = (
    "The bridge was closed for repairs, so we took the ferry across the river.",
    "A slow first hour, but the last scene alone is worth the ticket.",
    "Name three things that float on water, and say why each of them does.",
    "def area(width, height):\n    return width *",
    "Dear Ms Okafor,\n\nthank you for your letter of 3 March. We have looked into the matter and",
    "17 + 25 = 42; 42 / 7 =",
    "Der Zug nach Köln fährt heute von Gleis 9. ¿A qué hora llega? 明日は雨が降るでしょう。",
    "Yes.",
)
"""Of several lengths and kinds, so that many of a model's tokens and positions take part."""
_LONGEST = 128
"""Tokens of a prompt; what is beyond is cut off."""
_MOST = 64
"""Prompts; the scores of all of them are kept, for each token one for each word of the vocabulary."""
_IMAGES = 4
_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Probes:
    """What models are asked; each entry is one call."""

    inputs: list[dict[str, Tensor]]
    texts: list[str] = field(default_factory=list)
    """The prompts that were made into inputs; none where the model reads images."""


@dataclass(frozen=True)
class Difference:
    """How far the scores of two models are apart over all probes."""

    largest: float
    mean: float
    scale: float
    """The largest of the first model's scores, without its sign."""
    agreement: float | None
    """Share of the places (tokens, or whole inputs) where both score the same class highest; None without classes."""
    places: int

    @property
    def relative(self) -> float:
        """The largest difference as a share of the scale."""
        return self.largest / max(self.scale, torch.finfo(torch.float32).tiny)

    @property
    def relative_mean(self) -> float:
        """The mean difference as a share of the scale."""
        return self.mean / max(self.scale, torch.finfo(torch.float32).tiny)

    def as_plain(self) -> dict[str, Any]:
        """All figures by their names."""
        return {**vars(self), "relative": self.relative, "relative_mean": self.relative_mean}


def reads_images(model: nn.Module) -> bool:
    """Whether the model takes images rather than tokens.

    Raises:
        UserError: it takes something else.
    """
    kind = getattr(model, "main_input_name", "input_ids")
    if kind not in ("input_ids", "pixel_values"):
        raise UserError(f"This {type(model).__name__} reads {kind}; it can be probed if it reads tokens or images.")
    return bool(kind == "pixel_values")


def text_probes(model: nn.Module, tokenizer: Any, texts: Sequence[str] = PROMPTS) -> Probes:
    """The texts as the model reads them, one by one; a model that writes from them gets the beginning of an answer.

    Raises:
        UserError: there is no text, or there are too many.
    """
    if not 1 <= len(texts) <= _MOST:
        raise UserError(f"There are {len(texts)} prompts; expected 1 to {_MOST}.")
    config: Any = model.config
    positions = getattr(config, "max_position_embeddings", None) or _LONGEST
    longest = max(1, min(_LONGEST, positions - 4))  # some models number their positions from 2 or 4 on
    taken = inspect.signature(model.forward).parameters
    inputs = []
    for text in texts:
        encoded = tokenizer(text, return_tensors="pt", truncation=True, max_length=longest)
        found = {key: value for key, value in encoded.items() if key in taken}
        if config.is_encoder_decoder and model.get_output_embeddings() is not None:  # type: ignore[operator]
            found["decoder_input_ids"] = _shifted(found["input_ids"], config)
        inputs.append(found)
    return Probes(inputs, list(texts))


def image_probes(model: nn.Module) -> Probes:
    """Images of noise, normalised as a processor would, in the size of the model; the same ones each time."""
    config: Any = model.config
    size = getattr(config, "image_size", None) or 224
    height, width = size if isinstance(size, list | tuple) else (size, size)
    generator = torch.Generator().manual_seed(0)
    shape = (1, getattr(config, "num_channels", 3), height, width)
    return Probes([{"pixel_values": torch.randn(shape, generator=generator)} for _ in range(_IMAGES)])


@torch.no_grad()
def answers(model: nn.Module, probes: Probes) -> list[Tensor]:
    """The model's scores for each probe in its own precision, then as float32 on the CPU: (..., classes).

    Those of a model without a head are its last hidden states.
    """
    beside = next(model.parameters())
    dtype = next((p.dtype for _, p in own_parameters(model) if p.is_floating_point()), torch.float32)
    found = []
    with _evaluated(model), _precision(model):
        for inputs in probes.inputs:
            placed = {key: value.to(beside.device) for key, value in inputs.items()}
            placed = {key: value.to(dtype) if value.is_floating_point() else value for key, value in placed.items()}
            found.append(_scores(model(**placed)).float().cpu())
    return found


def difference(expected: Sequence[Tensor], given: Sequence[Tensor], has_classes: bool = True) -> Difference:
    """How far `given` is from `expected`, entry by entry of the same shapes; a NaN on either side makes it NaN."""
    gaps = [torch.where(a == b, 0.0, (a - b).abs()) for a, b in zip(expected, given, strict=True)]  # inf is inf
    places = [a.argmax(-1) == b.argmax(-1) for a, b in zip(expected, given, strict=True)]
    scale = max(float(a[a.isfinite()].abs().max()) if a.isfinite().any() else 0.0 for a in expected)
    has_classes = has_classes and expected[0].shape[-1] > 1
    count = sum(place.numel() for place in places)
    return Difference(
        largest=float(torch.stack([gap.max() for gap in gaps]).max()),  # of tensors, for Python's max passes NaN over
        mean=sum(float(gap.double().sum()) for gap in gaps) / sum(gap.numel() for gap in gaps),
        scale=scale,
        agreement=sum(int(place.sum()) for place in places) / count if has_classes else None,
        places=count,
    )


def has_classes(model: nn.Module) -> bool:
    """Whether the model's scores are those of classes or tokens, so that the highest of them means something."""
    architecture = type(model).__name__
    return "For" in architecture or "LMHead" in architecture


def _shifted(ids: Tensor, config: Any) -> Tensor:
    known = (getattr(config, f"{kind}_token_id", None) for kind in ("decoder_start", "bos", "pad"))
    start = next((number for number in known if number is not None), 0)
    return torch.cat([torch.full_like(ids[:, :1], start), ids[:, :-1]], dim=1)


def _scores(output: Any) -> Tensor:
    for name in ("logits", "last_hidden_state"):
        if isinstance(getattr(output, name, None), Tensor):
            scores: Tensor = getattr(output, name)
            return scores
    names = listed(output.keys()) if hasattr(output, "keys") else type(output).__name__
    raise UserError(f"The model gives {names}; expected logits or last_hidden_state, to be compared.")


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    was = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in was.items():
            module.training = training


def _precision(model: nn.Module) -> AbstractContextManager[Any]:
    """Automatic mixed precision where a half-precision base has heads or norms that were trained in float32."""
    found = {p.dtype for _, p in own_parameters(model) if p.is_floating_point()}
    half = next((dtype for dtype in found if dtype in _HALF), None)
    if half is None or len(found) == 1:
        return nullcontext()
    return torch.autocast(next(model.parameters()).device.type, half)
