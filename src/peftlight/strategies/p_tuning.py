"""GPT Understands, Too (P-tuning).

Xiao Liu, Yanan Zheng, Zhengxiao Du, Ming Ding, Yujie Qian, Zhilin Yang, Jie Tang, 2021,
https://arxiv.org/abs/2103.10385
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from peftlight.delta import Delta
from peftlight.entrance import Compat, check_count, deltas_for, entrance_of
from peftlight.errors import UserError
from peftlight.strategies.prompt import PromptTuning, check_choice, check_number, rows_for
from peftlight.strategy import Adapter, PEFTStrategy

_LAYERS = 2


@dataclass
class PTuning(PEFTStrategy):
    """Train virtual tokens through a small network, which is left out once they are trained."""

    num_virtual_tokens: int = 20
    """Number n of virtual tokens."""
    encoder: Literal["mlp", "lstm"] = "mlp"
    """The network: three linear layers, or an LSTM in both directions with two linear layers after it (the paper's)."""
    encoder_hidden_size: int | None = None
    """Width h of the network; none: that of the embeddings."""
    encoder_num_layers: int = _LAYERS
    """Layers of the LSTM."""
    encoder_dropout: float = 0.0
    """Dropout between the layers of the LSTM."""
    compat: Compat | None = None
    """peft: HF PEFT's numbers, with outputs and pooling that include the virtual tokens; none: the real ones alone."""

    starts_unchanged = False

    def __post_init__(self) -> None:
        check_number(self.num_virtual_tokens, "PTuning")
        check_choice("encoder", self.encoder, ("mlp", "lstm"))
        check_choice("compat", self.compat, (None, "peft"))
        for name, number in (("hidden_size", self.encoder_hidden_size), ("num_layers", self.encoder_num_layers)):
            if number is not None and number < 1:
                raise UserError(f"encoder_{name} is at least 1; got {number}.")
        if not 0 <= self.encoder_dropout < 1:
            raise UserError(f"encoder_dropout is a share from 0 up to, not including, 1; got {self.encoder_dropout}.")
        if self.encoder == "mlp" and (self.encoder_num_layers, self.encoder_dropout) != (_LAYERS, 0):
            raise UserError("encoder_num_layers and encoder_dropout belong to the LSTM: set encoder to lstm.")
        if self.encoder_dropout and self.encoder_num_layers == 1:
            raise UserError("encoder_dropout acts between the LSTM's layers, and encoder_num_layers is 1: set it to 2.")

    def deltas(self, model: nn.Module) -> Iterator[tuple[str, Delta]]:
        entrance = entrance_of(model, "PTuning", self.compat)
        check_count(self.num_virtual_tokens, entrance, "PTuning")
        rows, width = rows_for(model, self.num_virtual_tokens, self.compat), entrance.width
        hidden = self.encoder_hidden_size or width
        prompt: nn.Module = MLPPrompt(rows, width, hidden)
        if self.encoder == "lstm":
            prompt = LSTMPrompt(rows, width, hidden, self.encoder_num_layers, self.encoder_dropout)
        yield from deltas_for(model, prompt, self.num_virtual_tokens, entrance, self.compat)

    def finished(self, adapter: Adapter) -> PEFTStrategy:
        return PromptTuning(self.num_virtual_tokens, init="random", compat=self.compat)


class MLPPrompt(nn.Module):
    """P = W3 relu(W2 relu(W1 Z + b1) + b2) + b3, with Z (n, width), W1 (h, width), W2 (h, h), W3 (width, h)."""

    def __init__(self, count: int, width: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(count, width, device="cpu", dtype=torch.float32)
        self.network = nn.Sequential(
            _linear(width, hidden), nn.ReLU(), _linear(hidden, hidden), nn.ReLU(), _linear(hidden, width)
        )

    def forward(self) -> Tensor:
        rows: Tensor = self.network(self.embedding.weight)
        return rows


class LSTMPrompt(nn.Module):
    """P = W2 relu(W1 [forward LSTM(Z); backward LSTM(Z)] + b1) + b2, with Z (n, width) (equation 5).

    The LSTM's two directions give h values each; W1 (2 h, 2 h), W2 (width, 2 h).
    """

    def __init__(self, count: int, width: int, hidden: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(count, width, device="cpu", dtype=torch.float32)
        self.lstm = nn.LSTM(
            width, hidden, layers, dropout=dropout, bidirectional=True, batch_first=True, device="cpu",
            dtype=torch.float32,
        )  # fmt: skip
        self.network = nn.Sequential(_linear(2 * hidden, 2 * hidden), nn.ReLU(), _linear(2 * hidden, width))

    def forward(self) -> Tensor:
        rows: Tensor = self.network(self.lstm(self.embedding.weight)[0])
        return rows


def _linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, device="cpu", dtype=torch.float32)
