"""Trainings on several processes against one: each world of processes is started once and trains every case."""

import dataclasses
import os
import socket
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

import forked  # noqa: F401  # so that processes are forked from one that has imported everything
from models import make
from peftlight import PEFTStrategy, save_adapter
from peftlight.data.sampling import EpochSampler, Sampled
from peftlight.processes import FSDP2Strategy
from peftlight.shards import whole
from peftlight.tasks import CausalLM, PEFTModule, SequenceClassification
from recipes import RECIPES
from tasks.small import class_rows, constant, padded, quiet_trainer, token_rows

GLOBAL_BATCH = 8
LENGTHS = [5, 9, 7, 3, 8, 6, 4] * 4
"""One row too few for whole global batches: of the last one, two processes of four have nothing to learn from."""
ON_BERT = {"bitfit", "bitfit_subset", "compacter", "full", "houlsby", "layer_norm", "mam", "p_tuning", "prefix"}
"""The strategies that are tried on a classifier; the others on a model that predicts tokens."""


@dataclass(frozen=True)
class Case:
    """One training of at most four optimizer steps."""

    strategy: str
    trainer: dict[str, Any] = field(default_factory=dict)
    task: dict[str, Any] = field(default_factory=dict)
    shard_adapter: bool = True
    changed: dict[str, Any] = field(default_factory=dict)
    """Fields of the strategy that differ from its YAML."""

    @property
    def name(self) -> str:
        options = [f"{key}={value}" for key, value in {**self.trainer, **self.task}.items()]
        return " ".join([self.strategy, *options, *([] if self.shard_adapter else ["replicated"])])

    def module(self) -> PEFTModule:
        on_bert = self.strategy in ON_BERT
        task, model = (SequenceClassification, make("bert")) if on_bert else (CausalLM, make("llama"))
        # For what the strategy draws: in each process something else, and what the first one drew has to hold for all.
        torch.manual_seed(5 + int(os.environ.get("LOCAL_RANK", 0)))
        adam: Any = lambda parameters: torch.optim.AdamW(parameters, lr=1e-3)  # noqa: E731
        strategy = without_dropout(RECIPES[self.strategy]())
        strategy = dataclasses.replace(strategy, **self.changed) if self.changed else strategy  # type: ignore[type-var]
        return task(model, strategy, optimizer=adam, lr_scheduler=constant, **self.task)


@dataclass
class Outcome:
    """What a training came to, the same in every process."""

    gradients: dict[str, Tensor]
    """Those of the first step."""
    adapter: dict[str, Tensor]
    dtypes: set[torch.dtype]
    """Of the trained parameters, of their gradients and of their optimizer's state."""
    verdict: str


def without_dropout(strategy: PEFTStrategy) -> PEFTStrategy:
    """Processes draw other masks than one process does."""
    parts = getattr(strategy, "strategies", None)
    if parts is not None:
        return dataclasses.replace(strategy, strategies=[without_dropout(part) for part in parts])  # type: ignore[type-var]
    return dataclasses.replace(strategy, dropout=0.0) if hasattr(strategy, "dropout") else strategy  # type: ignore[type-var]


class SharedRows(LightningDataModule):
    """Rows that the processes share out as those of every `DataFamily`."""

    label_names = tokenizer = None

    def __init__(self, words: bool) -> None:
        super().__init__()
        self.rows = token_rows(LENGTHS) if words else class_rows(LENGTHS, [row % 3 for row in range(len(LENGTHS))])

    def train_dataloader(self) -> DataLoader[Any]:
        assert self.trainer is not None
        return self._loader(GLOBAL_BATCH // self.trainer.world_size, None)

    def global_batches(self) -> DataLoader[Any]:
        return self._loader(GLOBAL_BATCH, {"num_replicas": 1, "rank": 0})

    def _loader(self, size: int, share: dict[str, int] | None) -> DataLoader[Any]:
        sampler = EpochSampler(len(self.rows), seed=lambda: 1, shuffle=True, share=share)
        return DataLoader(Sampled(self.rows), size, sampler=sampler, collate_fn=_collated)  # type: ignore[arg-type]


def _collated(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    return padded([{**row, "labels": _as_tensor(row["labels"])} for row in rows])


def _as_tensor(labels: Any) -> Any:
    return torch.as_tensor(labels) if hasattr(labels, "__len__") else labels


class FirstGradients(Callback):
    """Notes the gradients that the optimizer's first step sees."""

    def __init__(self) -> None:
        self.seen: dict[str, Tensor] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.optimizers[0].register_step_post_hook(lambda *_: self._note(pl_module))

    def _note(self, module: Any) -> None:
        if not self.seen:
            self.seen = {name: whole(p.grad).cpu().clone() for name, p in module.adapter.parameters().items()}


def trained(case: Case, kind: str, processes: int, folder: Path, accelerator: str = "cpu") -> Outcome:
    """Train one case in this process, together with the others of its world, and save its adapter in `folder`."""
    module, first = case.module(), FirstGradients()
    strategy: Any = FSDP2Strategy(shard_adapter=case.shard_adapter) if kind == "fsdp2" else kind
    trainer = quiet_trainer(
        folder, [first], strategy=strategy, devices=processes, accelerator=accelerator, **case.trainer
    )
    trainer.fit(module, datamodule=SharedRows(words=isinstance(module, CausalLM)))
    assert module.adapter is not None
    if kind == "fsdp2" or trainer.is_global_zero:
        save_adapter(module.adapter, folder / case.name)
    parameters = list(module.adapter.parameters().values())
    kept = [value for state in trainer.optimizers[0].state.values() for value in state.values() if value.dim()]
    dtypes = {tensor.dtype for tensor in (*parameters, *kept, *first.seen.values())}
    with module.adapter.whole():
        state = {name: value.cpu().clone() for name, value in module.adapter.state().items()}
    return Outcome(first.seen, state, dtypes, str(module.audit()))


def world(
    processes: int, kinds: Sequence[str], cases: Sequence[Case], folder: Path, accelerator: str = "cpu"
) -> dict[tuple[str, str], Outcome]:
    """Train every case in every kind of world; adapters are in `folder` / kind, outcomes are the last process's."""
    spawn(_train_all, processes, kinds, cases, folder, accelerator)
    found: dict[tuple[str, str], Outcome] = torch.load(folder / "outcomes.pt", weights_only=False)
    return found


def _train_all(
    rank: int, processes: int, kinds: Sequence[str], cases: Sequence[Case], folder: Path, accelerator: str
) -> None:
    found = {
        (kind, case.name): trained(case, kind, processes, folder / kind, accelerator)
        for kind in kinds for case in cases
    }  # fmt: skip
    if rank == processes - 1:
        torch.save(found, folder / "outcomes.pt")


def spawn(function: Callable[..., None], processes: int, *arguments: Any, start: str = "forkserver") -> None:
    """Call function(rank, processes, *arguments) in as many processes, which Lightning takes for those of one run; with
    start="spawn" each has an interpreter of its own, which ends as a user's does.

    Raises:
        AssertionError: after ten minutes they were still there, waiting for each other probably; they are ended.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = (processes, port, function, arguments)
    started: Any = mp.start_processes(_one_process, given, processes, join=False, start_method=start)
    until = time.monotonic() + 600
    while not started.join(timeout=1):
        if time.monotonic() > until:
            for process in started.processes:
                process.kill()
            raise AssertionError(f"{processes} processes did not end")


def _one_process(
    rank: int, processes: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    os.environ.pop("PL_GLOBAL_SEED", None)  # an earlier test's: DDP would seed with it once more
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    where = {"LOCAL_RANK": rank, "NODE_RANK": 0, "WORLD_SIZE": processes, "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in where.items()}, MASTER_ADDR="127.0.0.1")
    function(rank, processes, *arguments)
