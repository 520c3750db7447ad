"""A training loader in the middle of an epoch; Lightning keeps it, and its state, on the private side of its loop."""

from typing import Any

import torch
from lightning.pytorch import Trainer

from peftlight import random_state


def epoch_state(trainer: Trainer) -> dict[str, Any]:
    """All that the order of the coming epoch may depend on; taken before its loader is iterated."""
    return {"random": random_state.taken(), "generators": generator_states(trainer)}


def first_state(trainer: Trainer, random: dict[str, Any]) -> dict[str, Any]:
    """The same for the first epoch, whose loader Lightning has iterated already; `random` is from before that."""
    states = [torch.Generator().manual_seed(g.initial_seed()).get_state() for g in _generators(trainer)]
    return {"random": random, "generators": states}


def iterate(trainer: Trainer) -> None:
    """Begin the epoch, as Lightning does except in the first one of a resumed training."""
    fetcher = trainer.fit_loop._data_fetcher
    assert fetcher is not None
    iter(fetcher)


def renew(trainer: Trainer, in_epoch: bool) -> None:
    """With `reload_dataloaders_every_n_epochs`: have the loader renewed when it would have been."""
    every: int = trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]  # Lightning sets it from outside
    loop = trainer.fit_loop
    if every:
        if in_epoch:
            loop.setup_data()
        last = trainer.current_epoch if in_epoch else trainer.current_epoch - 1
        loop._last_train_dl_reload_epoch = last - last % every


def move_to(trainer: Trainer, epoch: int, batches: int, state: dict[str, Any] | None) -> None:
    """Let the epoch go on after as many batches; this may move the random numbers.

    Our own loaders begin there, and those that carry a state load it. With any other the epoch is begun as it was, from
    the state of then, and the batches done are drawn and dropped.
    """
    loop = trainer.fit_loop
    fetcher, combined = loop._data_fetcher, loop._combined_loader
    assert fetcher is not None
    assert combined is not None
    samplers: list[Any] = [getattr(loader, "sampler", None) for loader in combined.flattened]
    if batches == trainer.num_training_batches:
        fetcher.iterator = iter(())
    elif all(hasattr(sampler, "begin") for sampler in samplers):
        for loader, sampler in zip(combined.flattened, samplers, strict=True):
            sampler.begin(epoch, batches * loader.batch_size)
        iter(fetcher)
    elif loop._combined_loader_states_to_load:
        combined._load_state_dicts(loop._combined_loader_states_to_load)
        loop._combined_loader_states_to_load = []
        iter(fetcher)
    elif state is not None:
        _replay(trainer, epoch, batches, state)
    fetcher.fetched = 0  # Lightning adds the batches done


def _replay(trainer: Trainer, epoch: int, batches: int, state: dict[str, Any]) -> None:
    fetcher, combined = trainer.fit_loop._data_fetcher, trainer.fit_loop._combined_loader
    assert fetcher is not None
    assert combined is not None
    for loader in combined.flattened:
        if hasattr(getattr(loader, "sampler", None), "set_epoch"):
            loader.sampler.set_epoch(epoch)
    random_state.put_back(state["random"])
    set_generators(trainer, state["generators"])
    iter(fetcher)
    for _ in range(batches):
        next(fetcher)


def generator_states(trainer: Trainer) -> list[torch.Tensor]:
    """Those of the generators that users gave to their training loaders."""
    return [generator.get_state() for generator in _generators(trainer)]


def set_generators(trainer: Trainer, states: list[torch.Tensor]) -> None:
    """Go on with them where these states were taken."""
    for generator, state in zip(_generators(trainer), states, strict=False):
        generator.set_state(state)


def _generators(trainer: Trainer) -> list[torch.Generator]:
    combined = trainer.fit_loop._combined_loader
    holders = [holder for loader in (() if combined is None else combined.flattened)
               for holder in (loader, getattr(loader, "sampler", None))]  # fmt: skip
    found = [getattr(holder, "generator", None) for holder in holders]
    return list({id(generator): generator for generator in found if isinstance(generator, torch.Generator)}.values())
