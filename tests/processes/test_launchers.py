"""The same configuration under Lightning's own launcher and under torchrun: one run, one folder, one adapter."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from lightning.pytorch import Trainer
from safetensors.torch import load_file
from torch import equal

from peftlight.cli import main
from peftlight.environment import is_first_process
from peftlight.errors import UserError
from peftlight.processes.size import check_size
from processes.ranks import fit, trouble

PEFTLIGHT = [sys.executable, "-W", "ignore", "-m", "peftlight"]
TORCHRUN = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            "-m", "peftlight"]  # fmt: skip


def started(launcher: list[str], arguments: list[str], folder: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}
    return subprocess.Popen([*launcher, *arguments], cwd=folder, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip


@pytest.mark.slow
def test_torchrun_makes_one_folder_with_the_adapter_of_lightnings_launcher(tmp_path: Path, encoder: Path) -> None:
    folders = {"lightning": [sys.executable, "-m", "peftlight"], "torchrun": TORCHRUN}
    processes = {
        name: started(launcher, [*fit(tmp_path / name, encoder), "--trainer.devices=2"], tmp_path / name)
        for name, launcher in folders.items()
    }
    adapters = []
    for name, process in processes.items():
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said
        assert "4 rows each (2 x 1 accumulated x 2 processes)" in said
        for remark in ("sync_dist", "LeafSpec", "many workers"):
            assert remark not in said
        (run,) = (tmp_path / name / "runs").iterdir()
        assert (run / "log.txt").is_file()
        adapters.append(load_file(run / "adapter" / "adapter_model.safetensors"))
    one, other = adapters
    assert one.keys() == other.keys()
    assert all(equal(one[key], other[key]) for key in one)


@pytest.mark.slow
def test_a_killed_process_ends_what_was_launched_with_its_name_and_code_1(tmp_path: Path, encoder: Path) -> None:
    arguments = [*fit(tmp_path, encoder), *trouble("step", 1, "kill"), "--trainer.devices=2"]
    process = started(PEFTLIGHT, arguments, tmp_path)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "error: process 1 on" in said
    assert "zombies" not in said, "the launcher's own words"


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "code"), [(PEFTLIGHT, 2), (TORCHRUN, 1)], ids=["lightning", "torchrun"])
def test_an_error_ends_what_was_launched(launcher: list[str], code: int, tmp_path: Path, encoder: Path) -> None:
    arguments = [*fit(tmp_path, encoder), *trouble("step", 1), "--trainer.devices=2"]
    process = started(launcher, arguments, tmp_path)
    said, _ = process.communicate(timeout=300)  # the pipe's end: no process is left that could write
    assert time.time() - float((tmp_path / "when").read_text()) < 60
    assert process.returncode == code
    assert "error: process 1 on" in said
    assert "failed, and with it the whole run: the step went wrong" in said


@pytest.mark.slow
def test_a_port_that_another_has_ends_all_that_was_launched(
    tmp_path: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        process = started(PEFTLIGHT, [*fit(tmp_path, encoder), "--trainer.devices=2"], tmp_path)
        said, _ = process.communicate(timeout=300)  # the pipe's end: no process is left that could write
    assert process.returncode == 2
    assert f"error: The processes cannot meet at port {port}, MASTER_PORT in the environment" in said


@pytest.mark.filterwarnings("ignore")
def test_processes_that_would_each_train_alone_are_refused(
    tmp_path: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [option for option in fit(tmp_path, encoder) if "strategy=ddp" not in option]
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("TORCHELASTIC_RUN_ID", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    assert main([*arguments, "--trainer.devices=1"]) == 2
    said = capsys.readouterr().err
    assert "torchrun started 2 processes (machines: 1), but the configuration asks for 1" in said
    assert "--trainer.devices 2 --trainer.num_nodes 1" in said
    assert not list((tmp_path / "runs").glob("*"))


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, "torchrun started 8 .*machines: 2"),
        (
            {"SLURM_STEP_NUM_TASKS": "6", "SLURM_STEP_NUM_NODES": "3"},
            "srun started 6 .*devices 2 --trainer.num_nodes 3",
        ),
    ],
)
def test_the_launchers_number_is_compared(
    environment: dict[str, str], found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    check_size(trainer)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=found):
        check_size(trainer)


def test_jobs_in_which_lightning_starts_the_processes_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    monkeypatch.setenv("SLURM_JOB_NAME", "interactive")
    check_size(trainer)


@pytest.mark.parametrize(
    ("number", "machine", "first"), [(0, None, True), (0, "0", True), (0, "1", False), (1, "0", False)]
)
def test_only_one_process_of_all_machines_makes_the_folder(
    number: int, machine: str | None, first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning.pytorch.utilities.rank_zero_only.rank", number)
    if machine is not None:
        monkeypatch.setenv("NODE_RANK", machine)
    assert is_first_process() == first
