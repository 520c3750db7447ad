"""A process that is killed while it replaces an adapter leaves the old one or the new one, whole."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from forked import _SERVER
from models import make
from peftlight import attach, files, load_adapter, save_adapter
from peftlight.errors import UserError
from peftlight.strategies import LoRA


def trained(alpha: int):
    adapter = attach(make("bert"), LoRA(rank=2, alpha=alpha))
    torch.manual_seed(alpha)
    for parameter in adapter.parameters().values():
        parameter.data.normal_()
    return adapter


def save_in_so_many_steps(left: int, folder: Path) -> None:
    """Save another adapter; before one step more it ends as by a kill: nothing is tidied up."""

    def counted(do: Callable[..., Any]) -> Callable[..., Any]:
        def stop_or_do(*arguments: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                os._exit(9)
            return do(*arguments)

        return stop_or_do

    os.replace, files._flush = counted(os.replace), counted(files._flush)
    save_adapter(trained(8), folder)


@pytest.mark.slow
@pytest.mark.parametrize("there", [True, False], ids=["replaced", "first"])
def test_at_every_moment_the_old_or_the_new_one_is_whole(tmp_path: Path, there: bool) -> None:
    old, new = trained(4), trained(8)
    seen = set()
    for steps in range(20):
        folder = tmp_path / str(steps)
        if there:
            save_adapter(old, folder)
        process = _SERVER.Process(target=save_in_so_many_steps, args=(steps, folder))
        process.start()
        process.join()
        assert process.exitcode in (0, 9)
        if not there and not (folder / ".written").exists() and process.exitcode:
            with pytest.raises(UserError, match=r"adapter_config\.json|no such folder"):
                load_adapter(make("bert"), folder)
            continue
        loaded = load_adapter(make("bert"), folder)
        which = loaded.strategy.alpha
        seen.add(which)
        expected = {4: old, 8: new}[which].state()
        assert all(torch.equal(value, expected[key]) for key, value in loaded.state().items())
        assert sorted(path.name for path in folder.iterdir() if not path.name.endswith(".new")) == [
            "adapter_config.json", "adapter_model.safetensors", "peftlight.json"]  # fmt: skip
        if process.exitcode == 0:
            break
    else:
        raise AssertionError("it was never allowed to finish")
    assert seen == ({4, 8} if there else {8})
