"""A process that is killed while it replaces an adapter leaves the old one or the new one, whole."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models import make
from peftlight import attach, load_adapter, save_adapter
from peftlight.errors import UserError
from peftlight.strategies import LoRA

CHILD = """
import os, sys
sys.path.insert(0, {tests!r})
from interop.test_interrupted import trained
from peftlight import files, save_adapter
left = int(sys.argv[2])

def counted(do):
    def stop_or_do(*arguments):
        global left
        left -= 1
        if left < 0:
            os._exit(9)  # as a kill does: nothing is tidied up
        return do(*arguments)
    return stop_or_do

os.replace, files._flush = counted(os.replace), counted(files._flush)
save_adapter(trained(8), sys.argv[1])
print("done")
"""


def trained(alpha: int):
    adapter = attach(make("bert"), LoRA(rank=2, alpha=alpha))
    torch.manual_seed(alpha)
    for parameter in adapter.parameters().values():
        parameter.data.normal_()
    return adapter


@pytest.mark.slow
@pytest.mark.parametrize("there", [True, False], ids=["replaced", "first"])
def test_at_every_moment_the_old_or_the_new_one_is_whole(tmp_path: Path, there: bool) -> None:
    old, new = trained(4), trained(8)
    seen = set()
    for steps in range(20):
        folder = tmp_path / str(steps)
        if there:
            save_adapter(old, folder)
        code = CHILD.format(tests=str(Path(__file__).parents[1]))
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(folder), str(steps)],
                              capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
        assert done.returncode in (0, 9), done.stderr[-2000:]
        if not there and not (folder / ".written").exists() and done.returncode:
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
        if done.returncode == 0:
            break
    else:
        raise AssertionError("it was never allowed to finish")
    assert seen == ({4, 8} if there else {8})
