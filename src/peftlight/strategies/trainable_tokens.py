"""Trainable tokens: single rows of the embedding are trained and the rest of the table stays frozen.

There is no paper; the method is that of HF PEFT's TRAINABLE_TOKENS, for tokens that were added to a vocabulary or that
take on a new meaning.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftlight.delta import Base, Delta
from peftlight.errors import UserError, listed
from peftlight.linear import weight_of
from peftlight.paths import input_embedding
from peftlight.strategy import PEFTStrategy
from peftlight.targets import matching


@dataclass
class TrainableTokens(PEFTStrategy):
    """Train the embeddings of chosen tokens; where the output layer is tied to the embedding, its rows too."""

    token_indices: list[int] = field(default_factory=list)
    """Which tokens, as numbers in the vocabulary."""
    target_modules: list[str] | None = None
    """Names of embeddings; none: the model's input embedding."""

    def __post_init__(self) -> None:
        if not self.token_indices:
            raise UserError("TrainableTokens trains the tokens in token_indices, and the list is empty.")
        if len(set(self.token_indices)) < len(self.token_indices):
            raise UserError(f"token_indices names a token twice: {self.token_indices}.")

    def deltas(self, model: nn.Module) -> Iterator[tuple[str, Delta]]:
        modules = dict(model.named_modules())
        for name in _input_embedding(model) if self.target_modules is None else matching(model, self.target_modules):
            table = modules[name]
            if not isinstance(table, nn.Embedding):
                raise UserError(f"{name} is a {type(table).__name__}; trainable tokens need an embedding.")
            wrong = [index for index in self.token_indices if not 0 <= index < table.num_embeddings]
            if wrong:
                raise UserError(f"token_indices: {listed(wrong)} lie outside {name}, which has tokens 0 to "
                                f"{table.num_embeddings - 1}.")  # fmt: skip
            rows = Rows(weight_of(table)[self.token_indices], self.token_indices)
            for tied, module in modules.items():
                if getattr(module, "weight", None) is table.weight:
                    embeds = isinstance(module, nn.Embedding)
                    yield tied, TokenRows(rows, table.num_embeddings) if embeds else TiedRows(rows)


def _input_embedding(model: nn.Module) -> list[str]:
    found = input_embedding(model)
    names = [name for name, module in model.named_modules() if module is found]
    if not names or not isinstance(found, nn.Embedding):
        raise UserError(
            f"TrainableTokens trains rows of the embedding of tokens, and this {type(model).__name__} does not say "
            "which that is. If it has one, name it in target_modules; otherwise choose LoRA instead."
        )
    return names[:1]


class Rows(nn.Module):
    """The trained rows (tokens, dim), which a tied output layer shares."""

    in_float32 = ("",)
    indices: Tensor

    def __init__(self, start: Tensor, indices: list[int]) -> None:
        super().__init__()
        self.values = nn.Parameter(start.detach().to(torch.float32, copy=True))
        self.register_buffer("indices", torch.tensor(indices, device=start.device), persistent=False)


class TokenRows(Delta):
    """h = R[j] where the token is the j-th of the trained ones, else E[token]; R starts as the rows of E."""

    place: Tensor

    def __init__(self, rows: Rows, vocabulary: int) -> None:
        super().__init__()
        self.rows = rows
        place = torch.full((vocabulary,), -1, device=rows.indices.device)
        place[rows.indices] = torch.arange(len(rows.indices), device=place.device)
        self.register_buffer("place", place, persistent=False)

    def forward(self, base: Base, x: Tensor) -> Tensor:
        y: Tensor = base(x)
        place = self.place[x]
        # Gemma multiplies its embeddings by a constant; the rows belong to the table, so they are multiplied too.
        new = F.embedding(place.clamp(min=0), self.rows.values) * getattr(base.module, "embed_scale", 1.0)
        return torch.where(place[..., None] >= 0, new.to(y.dtype), y)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight.index_copy(0, self.rows.indices, self.rows.values.to(weight)), bias


class TiedRows(Delta):
    """The scores of the trained tokens are x · R[j] (+ b), as those of the others are x · E[token]."""

    def __init__(self, rows: Rows) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, base: Base, x: Tensor) -> Tensor:
        y: Tensor = base(x)
        bias = getattr(base.module, "bias", None)
        own = F.linear(
            x.to(self.rows.values.dtype), self.rows.values, None if bias is None else bias[self.rows.indices]
        )
        return y.index_copy(-1, self.rows.indices, own.to(y.dtype))

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight.index_copy(0, self.rows.indices, self.rows.values.to(weight)), bias
