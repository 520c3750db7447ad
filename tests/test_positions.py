"""How many tokens a model has positions for: with so many it computes, with one more it fails."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from models import make
from peftlight.positions import Positions, positions_of

_SIZES: dict[str, Any] = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                          "intermediate_size": 16}  # fmt: skip
_DECODERS: dict[str, Any] = {"vocab_size": 50, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
                             "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16,
                             "decoder_ffn_dim": 16, "max_position_embeddings": 20, "pad_token_id": 1}  # fmt: skip


def _made(kind: str, **sizes: Any) -> Callable[[], nn.Module]:
    def model() -> nn.Module:
        config = getattr(transformers, f"{kind}Config")(**sizes)
        return getattr(transformers, f"{kind}Model")(config).eval()  # type: ignore[no-any-return]

    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], Positions]] = {
    "bert": (_made("Bert", **_SIZES, max_position_embeddings=20), Positions(20, None)),
    "roberta": (_made("Roberta", **_SIZES, max_position_embeddings=20, pad_token_id=1), Positions(18, None)),
    "xlm-roberta": (_made("XLMRoberta", **_SIZES, max_position_embeddings=20, pad_token_id=1), Positions(18, None)),
    "mpnet": (_made("MPNet", **_SIZES, max_position_embeddings=20, pad_token_id=1), Positions(18, None)),
    "distilbert": (
        _made("DistilBert", vocab_size=50, dim=16, n_layers=1, n_heads=2, hidden_dim=16, max_position_embeddings=20),
        Positions(20, None),
    ),
    "gpt2": (_made("GPT2", vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=20), Positions(20, None)),
    "opt": (
        _made("OPT", vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16,
              max_position_embeddings=20, word_embed_proj_dim=16), Positions(20, None)
    ),
    "bart": (_made("Bart", **_DECODERS), Positions(20, None)),
    "pegasus": (_made("Pegasus", **_DECODERS), Positions(20, None)),
    "llama": (_made("Llama", **_SIZES, max_position_embeddings=20), Positions(None, 20)),
    "t5": (lambda: make("t5"), Positions(None, None)),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_positions_are_as_many_as_the_model_computes_with(name: str) -> None:
    build, expected = MODELS[name]
    model = build()
    assert positions_of(model) == expected
    most = expected.tabled
    _compute(model, 60 if most is None else most)
    if most is not None:
        with pytest.raises((IndexError, RuntimeError)):
            _compute(model, most + 1)


def _compute(model: nn.Module, tokens: int) -> None:
    ids = torch.full((1, tokens), 5)
    decoder = {"decoder_input_ids": ids[:, :2]} if getattr(model, "config").is_encoder_decoder else {}  # noqa: B009
    model(input_ids=ids, **decoder)


def test_the_decoder_of_an_encoder_decoder_has_positions_of_its_own() -> None:
    config = transformers.LEDConfig(**_DECODERS, max_encoder_position_embeddings=64, max_decoder_position_embeddings=16)
    model = transformers.LEDModel(config)
    assert positions_of(model, "rows").tabled == min(64, config.max_position_embeddings)
    assert positions_of(model, "targets").tabled == 16
