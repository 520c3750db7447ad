"""The promise about several processes: each with its share of the rows, the gradients are those of the whole batch."""

import pickle
import socket
import tempfile
from collections.abc import Iterable
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from peftlight.testing.training import Case

_PROCESSES = 2


def wrong_gradients(cases: list[Case]) -> list[list[str]]:
    """Of each case the names of the tensors whose gradient under DDP (gloo, CPU) is not that of one process."""
    found = gradients_of_processes(cases)
    return [_differing(case, gradients) for case, gradients in zip(cases, found, strict=True)]


def _differing(case: Case, found: dict[str, Tensor]) -> list[str]:
    adapter = case.stirred()
    (_halves(adapter.model, case, range(_PROCESSES)) / _PROCESSES).backward()
    own = {name: p.grad for name, p in adapter.parameters().items() if p.grad is not None}
    limit = 1e-4 * max(float(gradient.abs().max()) for gradient in own.values())
    return [name for name, grad in own.items() if name not in found or (found[name] - grad).abs().max() > limit]


def gradients_of_processes(cases: list[Case]) -> list[dict[str, Tensor]]:
    """The gradients of each case from two processes, each of which computes on half of the rows."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.NamedTemporaryFile(suffix=".pt") as file:
        mp.spawn(_one_process, (port, pickle.dumps(cases), file.name), nprocs=_PROCESSES)
        found: list[dict[str, Tensor]] = torch.load(file.name, weights_only=True)
    return found


def _one_process(rank: int, port: int, cases: bytes, file: str) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, _PROCESSES, rank == 0, timeout=timedelta(seconds=120))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=_PROCESSES)
    found = [_gradients(case, rank) for case in pickle.loads(cases)]
    if rank == 0:
        torch.save(found, file)
    dist.barrier()  # the first process keeps the others' meeting place
    dist.destroy_process_group()


def _gradients(case: Case, rank: int) -> dict[str, Tensor]:
    adapter = case.stirred()
    parallel = DistributedDataParallel(adapter.model)  # it has to live until the backward pass, in which it averages
    _halves(parallel, case, [rank]).backward()
    return {name: p.grad for name, p in adapter.parameters().items() if p.grad is not None}


def _halves(model: nn.Module, case: Case, parts: Iterable[int]) -> Tensor:
    """The sum of the losses of these parts of the rows."""
    model.train()
    losses = []
    for part in parts:
        torch.manual_seed(part)  # the same dropout, whoever computes this part
        share = {key: value.chunk(_PROCESSES)[part] for key, value in case.inputs.items()}
        losses.append(Case(case.make_strategy, case.make_model, share).loss(model))
    return torch.stack(losses).sum()
