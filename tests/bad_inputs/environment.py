"""A bad environment: no network, no room, no right to write, packages and devices that are not there, odd variables."""

from pathlib import Path

import torch

from bad_inputs.adapters import RunsCode
from bad_inputs.row import Row, row

_FIT = "fit --config run.yaml"
_LAUNCHED = {"RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
             "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999", "TORCHELASTIC_RUN_ID": "1"}  # fmt: skip
_PUSH = "push trained somebody/adapter --base somebody/model"


def _torn() -> None:
    for file in Path("trained/checkpoints").glob("*.ckpt"):
        if not file.is_symlink():
            file.write_bytes(file.read_bytes()[:-1000])


def _with_code() -> None:
    torch.save({"state_dict": {}, "evil": RunsCode()}, "evil.ckpt")


def _without(package: str, command: str, *says: str, **how: object) -> Row:
    return row(f"without {package}", command, *says, without=(package,), **how)


PLACES = [
    row(
        "a file for the folder of runs",
        f"{_FIT} --trainer.default_root_dir reviews.csv",
        "reviews.csv",
        "Not a directory",
    ),
    row("no right to write", f"{_FIT} --trainer.default_root_dir /proc/runs", "/proc/runs", "can be written"),
    row("a file for the cache", f"{_FIT} --data.cache_dir reviews.csv", "reviews.csv", "--data.cache_dir"),
    row(
        "a file for every cache",
        _FIT,
        "reviews.csv",
        "$PEFTLIGHT_CACHE",
        environment={"PEFTLIGHT_CACHE": "reviews.csv"},
    ),
    row(
        "no such place to write to", "evaluate trained --json /proc/nowhere/f.json", "Cannot write /proc/nowhere/f.json"
    ),
    row(
        "a full disk",
        f"{_FIT} --trainer.max_epochs 2",
        "No room left to write",
        ".ckpt",
        largest_file=20_000,
        alone=True,
    ),
]

PACKAGES = [
    _without("gguf", f"{_FIT} --model.base_model a.gguf", "pip install gguf", files={"a.gguf": b"GGUF" + bytes(40)}),
    _without("PIL", "fit --config see.yaml", "pip install pillow"),
    _without("matplotlib", "inspect trained --picture moved.png", "pip install", "plots"),
    _without("datasets", f"{_FIT} --data.source somebody/reviews", "pip install datasets", "--data.source path/to"),
    _without("pyarrow", f"{_FIT} --data.source a.parquet", "pip install pyarrow", files={"a.parquet": b"PAR1"}),
    _without("bitsandbytes", f"{_FIT} --trainer.callbacks+=Quantize", "bitsandbytes", "pip install"),
]

PROCESSES = [
    row("no such device", f"{_FIT} --trainer.accelerator cuda", "--trainer.accelerator", "CUDA", "There is cpu"),
    row("other processes than launched", f"{_FIT} --trainer.devices 4", "4", "2", environment=_LAUNCHED, alone=True),
    row("a rank that is no number", _FIT, "RANK is 'first'", "unset RANK", environment={"RANK": "first"}),
    row(
        "tasks of a job in all",
        _FIT,
        "4 tasks in all",
        "--ntasks-per-node=4",
        environment={"SLURM_NTASKS": "4", "SLURM_JOB_NAME": "train"},
        alone=True,
    ),
    row(
        "a number of processes without a launcher",
        _FIT,
        "WORLD_SIZE is 2",
        "train for itself",
        "torchrun",
        "unset WORLD_SIZE",
        environment={"WORLD_SIZE": "2", "RANK": "0"},
    ),
    row(
        "a machine that there is not",
        _FIT,
        "NODE_RANK is 1",
        "trainer.num_nodes 1",
        "unset NODE_RANK",
        environment={"NODE_RANK": "1"},
    ),
    row(
        "a job's rank that is no number",
        _FIT,
        "JSM_NAMESPACE_RANK is 'first'",
        "unset JSM_NAMESPACE_RANK",
        environment={"JSM_NAMESPACE_RANK": "first"},
    ),
    row("a number of processes that is none", _FIT, "WORLD_SIZE is 'two'", "unset", environment={"WORLD_SIZE": "two"}),
]

NETWORK = [
    row("no network to publish", _PUSH, "Nothing was published", "HF_HUB_OFFLINE", environment={"HF_TOKEN": "hf_x"}),
    row("no token to publish", _PUSH, "needs a token", "hf auth login", environment={"HF_TOKEN": ""}),
    row("a base that nobody else has", "push trained somebody/adapter", "./encoder", "--base USER/MODEL"),
]

CHECKPOINTS = [
    row(
        "a torn checkpoint",
        "validate --config run.yaml --ckpt_path trained/checkpoints/last.ckpt",
        "last.ckpt",
        "is damaged",
        make=_torn,
    ),
    row("torn checkpoints alone", "fit --resume trained", "trained/checkpoints", "last.ckpt", "is damaged", make=_torn),
    row(
        "code in a checkpoint", f"{_FIT} --ckpt_path evil.ckpt", "evil.ckpt is refused", "posix.mkdir", make=_with_code
    ),
    row(
        "code in a checkpoint to evaluate",
        "validate --config run.yaml --ckpt_path evil.ckpt",
        "evil.ckpt is refused",
        "posix.mkdir",
        make=_with_code,
    ),
    row("an adapter to resume", f"{_FIT} --resume trained/adapter", "folder of an adapter", "--init_adapter"),
    row("an empty name of a run", f"{_FIT} --resume ''", "--resume is followed by an empty text"),
    row("a change without its section", "fit --resume trained --allow_changes lr", "'optimizer.lr'"),
    row("no such run to resume", "fit --resume runs/yesterday", "runs/yesterday"),
]
ROWS = [*PLACES, *PACKAGES, *PROCESSES, *NETWORK, *CHECKPOINTS]
