"""Several processes of the command line as a launcher starts them, each with its own output, forked to start fast."""

import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from forked import _SERVER

TROUBLE = '''
import os, signal, time
from pathlib import Path
from lightning.pytorch import Callback
from peftlight.errors import UserError
from peftlight.tasks import SequenceClassification


class Trouble(Callback):
    """Something goes wrong in one process, or in all (-1), at one place."""

    def __init__(self, where: str = "nowhere", rank: int = -1, kind: str = "user", at: int = 3):
        self.where, self.rank, self.kind, self.at = where, rank, kind, at
        if where == "start" and os.environ["RANK"] == str(rank):
            while kind == "once":
                time.sleep(1)  # until the whole machine is lost
            raise UserError("the start went wrong")

    def meet(self, trainer, where):
        if where != self.where or self.rank not in (-1, trainer.global_rank):
            return
        if self.kind == "once" and Path("when").exists():
            return
        Path("when").write_text(str(time.time()))
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        while self.kind == "once":
            time.sleep(1)  # until the whole machine is lost
        further = " and on" * 5000 if self.kind == "long" else ""
        error = {"user": UserError, "collective": RuntimeError}.get(self.kind, ValueError)
        raise error(f"the {where} went wrong{further}")

    def setup(self, trainer, pl_module, stage):
        self.meet(trainer, "setup")

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.at:
            self.meet(trainer, "step")

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if trainer.global_step:
            self.meet(trainer, "validation")


class Model(SequenceClassification):
    def configure_model(self):
        for callback in self.trainer.callbacks:
            if isinstance(callback, Trouble):
                callback.meet(self.trainer, "configure_model")
        super().configure_model()
'''
"""A user's module whose callback fails where it is told to, and notes when."""


def fit(folder: Path, encoder: Path, **options: object) -> list[str]:
    """The arguments of a small fit in `folder`, with the callback above."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trouble.py").write_text(TROUBLE)
    rows = "".join(f"number {i} is {'good' if i % 2 else 'bad'}\t{i % 2}\n" for i in range(24))
    (folder / "rows.tsv").write_text("sentence\tlabel\n" + rows)
    settings = {
        "model": "trouble.Model", "model.strategy": "LoRA", "model.base_model": encoder, "data": "SST2",
        "data.source": "rows.tsv", "data.validation_source": "rows.tsv", "data.batch_size": 2,
        "data.cache_dir": folder / "cache", "trainer.max_epochs": 1, "trainer.accelerator": "cpu",
        "trainer.strategy": "ddp", "trainer.default_root_dir": "runs", "trainer.enable_progress_bar": "false",
        "trainer.num_sanity_val_steps": 0,
    }  # fmt: skip
    return ["fit", *(f"--{name}={value}" for name, value in (settings | options).items())]


def trouble(where: str, rank: int = -1, kind: str = "user", at: int = 3) -> list[str]:
    """Further arguments: what goes wrong, and at which step."""
    fields = {"where": where, "rank": rank, "kind": kind, "at": at}
    return ["--trainer.callbacks+=trouble.Trouble", *(f"--trainer.callbacks.{k}={v}" for k, v in fields.items())]


class Ranks:
    """Processes of one run."""

    def __init__(self, count: int, arguments: Sequence[str], folder: Path, shared: bool = False, of: int = 0) -> None:
        """
        Args:
            count: how many processes.
            arguments: what each of them is given.
            folder: where they work; what they say goes to 0.txt, 1.txt ... there.
            shared: whether all of them say it in 0.txt.
            of: how many there are to be, where some never come; 0: these.
        """
        self.folder = folder
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(of or count)}
        self.outputs = [folder / ("0.txt" if shared else f"{rank}.txt") for rank in range(count)]
        for output in self.outputs:
            output.write_text("")
        self.processes: list[ForkServerProcess] = []
        for rank in range(count):
            given = [*arguments, f"--trainer.devices={count}"]
            environment = {**common, "LOCAL_RANK": str(rank)}
            self.processes.append(_SERVER.Process(target=_main, args=(given, folder, self.outputs[rank], environment)))
            self.processes[-1].start()

    def ended(self) -> list[int]:
        """The exit codes, once all have ended; whatever still runs after five minutes is killed, with code -9."""
        until = time.monotonic() + 300
        for process in self.processes:
            process.join(max(0.0, until - time.monotonic()))
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid or 0, signal.SIGKILL)
                process.join()
        return [process.exitcode or 0 for process in self.processes]

    def said(self) -> list[str]:
        """What each process said."""
        return [output.read_text() for output in self.outputs]


def _main(arguments: list[str], folder: Path, output: Path, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    from lightning.pytorch.utilities import rank_zero_only

    rank_zero_only.rank = int(environment["LOCAL_RANK"])  # read at the import, which was in the forking process
    os.chdir(folder)
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.path.append(str(folder))
    import warnings

    import torch

    from peftlight.cli import main

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    sys.exit(main(arguments))
