"""What else holds where the base is sharded: checkpoints, resuming, evaluation, and what is refused."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor

from bases import tokenizer
from models import make
from peftlight.callbacks import Quantize
from peftlight.errors import UserError
from peftlight.processes import FSDP2Strategy
from peftlight.strategies import LoRA
from peftlight.tasks import CausalLM, Seq2Seq
from peftlight.tasks.distribution import refuse_other_distribution
from processes.worlds import Case, SharedRows, spawn
from tasks.small import QUIET, loader, padded, quiet_trainer, token_rows

pytestmark = [pytest.mark.slow, *QUIET]
MOVING_RANKS = {"rank": 3, "target_modules": ["q_proj", "down_proj"]}
"""With which EVA, on these rows, gives the layers other ranks than they were made with."""
RESUMED = {
    case.strategy: case
    for case in (Case("lora"), Case("eva", changed=MOVING_RANKS), *map(Case, ("adalora", "compacter", "full")))
}
EPOCHS = 2


def fitted(name: str, strategy: Any, processes: int, folder: Path, start: Path | None = None) -> dict[str, Tensor]:
    """The adapter after two epochs, with a checkpoint after each, from the start or from a checkpoint on."""
    module, keeper = RESUMED[name].module(), ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
    trainer = quiet_trainer(folder, [keeper], strategy=strategy, devices=processes, max_epochs=EPOCHS,
                            enable_checkpointing=True)  # fmt: skip
    trainer.fit(module, datamodule=SharedRows(words=isinstance(module, CausalLM)), ckpt_path=start)
    assert module.adapter is not None
    with module.adapter.whole():
        return {key: value.clone() for key, value in module.adapter.state().items()}


def validated(strategy: Any, processes: int, rank: int, folder: Path) -> dict[str, float]:
    """The metrics of an encoder-decoder on five rows, of which two processes have three and two."""
    rows = [{**row, "labels": row["input_ids"][:3]} for row in token_rows([5, 8, 6, 4, 7])]
    given = rows[rank::processes]
    if rank == 1:  # as the data families fill the last batch
        given.append({**rows[0], "labels": torch.full((3,), -100)})
    module = Seq2Seq(make("t5"), LoRA(target_modules=["q", "v"]), max_new_tokens=4)
    module.load_tokenizer = tokenizer  # type: ignore[method-assign]
    trainer = quiet_trainer(folder, strategy=strategy, devices=processes, use_distributed_sampler=False)
    (found,) = trainer.validate(module, loader([padded([row]) for row in given]), verbose=False)
    return dict(found)


def one_process(rank: int, processes: int, folder: Path) -> None:
    found: dict[str, Any] = {"validated": validated(FSDP2Strategy(), processes, rank, folder)}
    for name in RESUMED:
        found[name] = fitted(name, FSDP2Strategy(), processes, folder / name)
        start = folder / name / "epoch=0.ckpt"
        found[f"{name} resumed"] = fitted(name, FSDP2Strategy(), processes, folder / f"{name} resumed", start)
    torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """What the second of two processes found, and the folder of the checkpoints."""
    folder = tmp_path_factory.mktemp("two")
    spawn(one_process, 2, folder)
    return torch.load(folder / "1.pt"), folder


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_training_ends_where_the_undisturbed_one_does(name: str, two: tuple[dict[str, Any], Path]) -> None:
    through, resumed = two[0][name], two[0][f"{name} resumed"]
    assert through.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[key]) for key, value in through.items())
    if name == "eva":
        assert {len(value) for key, value in through.items() if key.endswith(".A")} != {3}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", RESUMED)
def test_checkpoints_are_those_of_a_single_process(name: str, two: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    fitted(name, "auto", 1, tmp_path)
    alone = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)
    sharded = torch.load(two[1] / name / "epoch=1.ckpt", weights_only=True)
    assert sharded.keys() == alone.keys()
    for part in ("state_dict", "optimizer_states"):
        assert shapes(sharded[part]) == shapes(alone[part])
    assert sharded["hyper_parameters"] == alone["hyper_parameters"]
    module = RESUMED[name].module()
    (found,) = quiet_trainer(tmp_path).validate(
        module, SharedRows(words=isinstance(module, CausalLM)).global_batches(), two[1] / name / "epoch=1.ckpt",
        verbose=False,
    )  # fmt: skip
    assert found["val_loss"] > 0
    assert module.adapter is not None
    assert all(torch.equal(value, two[0][name][key]) for key, value in module.adapter.state().items())


def shapes(content: Any) -> Any:
    """The content with shapes and formats in the place of tensors."""
    if isinstance(content, Tensor):
        return content.shape, content.dtype
    if isinstance(content, dict):
        return {key: shapes(value) for key, value in content.items()}
    return [shapes(value) for value in content] if isinstance(content, list) else content


def test_generation_goes_on_in_all_processes_until_the_last_has_no_row(
    two: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    assert two[0]["validated"] == pytest.approx(validated("auto", 1, 0, tmp_path), abs=1e-6)


@pytest.mark.parametrize(
    ("module", "asked", "expected"),
    [
        (CausalLM(make("llama"), LoRA()), {"precision": "16-mixed"}, "bf16-mixed, or --trainer.strategy ddp"),
        (
            CausalLM(make("llama"), LoRA()),
            {"predicting": True},
            "Choose --trainer.strategy ddp, or --trainer.devices 1",
        ),
        (LightningModule(), {}, "LightningModule is none. Choose ddp"),
    ],
)
def test_what_shards_do_not_go_with_is_refused(module: Any, asked: dict[str, Any], expected: str) -> None:
    if isinstance(module, CausalLM):
        module.configure_model()
    strategy = FSDP2Strategy()
    strategy.connect(module)
    with pytest.raises(UserError, match=re.escape(expected)):
        strategy.setup(SimpleNamespace(**{"predicting": False, "precision": "32-true", **asked}))  # type: ignore[arg-type]


def test_a_quantized_base_is_refused(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, strategy=FSDP2Strategy())
    with pytest.raises(UserError, match="Quantize does not go with FSDP2Strategy"):
        Quantize().setup(trainer, CausalLM(make("llama"), LoRA()), "fit")


@pytest.mark.parametrize(
    "strategy",
    [
        "fsdp",
        "fsdp_cpu_offload",
        "deepspeed_stage_3",
        "modelparallel",
        ModelParallelStrategy(),
        FSDPStrategy(),
        "ddp_spawn",
        "ddp_fork_find_unused_parameters_false",
        "ddp_notebook",
        DDPStrategy(start_method="spawn"),
    ],
)
def test_other_ways_to_distribute_are_refused_by_name(strategy: Any) -> None:
    with pytest.raises(UserError, match=r"trainer.strategy is .* Choose fsdp2 .* or ddp"):
        refuse_other_distribution(strategy)


def test_ours_and_ddp_are_not_refused() -> None:
    for strategy in ("fsdp2", "ddp", "auto", None, FSDP2Strategy()):
        refuse_other_distribution(strategy)
