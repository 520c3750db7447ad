"""1 process x batch 8, 2 x 4 and 4 x 2 train alike, under DDP and under FSDP2, whatever the strategy."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from processes.worlds import Case, Outcome, trained, world
from recipes import RECIPES
from tasks.small import QUIET

OPTIONS = [
    Case("lora", shard_adapter=False),
    Case("compacter", shard_adapter=False),
    Case("lora", trainer={"accumulate_grad_batches": 3, "gradient_clip_val": 0.01}),
    Case("full", trainer={"gradient_clip_val": 0.01}),
    Case("full", trainer={"gradient_clip_val": 0.02, "gradient_clip_algorithm": "value"}),
    Case("hyperlora", trainer={"gradient_clip_val": 0.01}),
    Case("lora", task={"gradient_checkpointing": True}),
]
CASES = [*map(Case, RECIPES), *OPTIONS]
HALF = [Case(name, trainer={"precision": "bf16-mixed"}) for name in ("lora", "adalora", "full")]
KINDS = ("ddp", "fsdp2")

pytestmark = [pytest.mark.slow, *QUIET]
Worlds = Callable[[int], tuple[dict[tuple[str, str], Outcome], Path]]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Worlds:
    """The outcomes and the folder of a world of so many processes, which is started once."""
    made: dict[int, tuple[dict[tuple[str, str], Outcome], Path]] = {}

    def of(processes: int) -> tuple[dict[tuple[str, str], Outcome], Path]:
        if processes not in made:
            folder = tmp_path_factory.mktemp(f"world{processes}")
            made[processes] = world(processes, KINDS, [*CASES, *(HALF if processes == 2 else [])], folder), folder
        return made[processes]

    return of


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], tuple[Outcome, Path]]:
    """The outcome and the folder of a case in this process alone."""
    folder, made = tmp_path_factory.mktemp("alone"), dict[str, Outcome]()

    def of(case: Case) -> tuple[Outcome, Path]:
        if case.name not in made:
            made[case.name] = trained(case, "auto", 1, folder)
        return made[case.name], folder / case.name

    return of


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gradients_and_adapters_are_those_of_one_process(
    case: Case, kind: str, processes: int, worlds: Worlds, alone: Callable[[Case], tuple[Outcome, Path]]
) -> None:
    expected, own_folder = alone(case)
    outcomes, folder = worlds(processes)
    found = outcomes[kind, case.name]
    assert found.gradients.keys() == expected.gradients.keys()
    largest = max(gradient.abs().max().item() for gradient in expected.gradients.values())
    assert largest > 0
    assert farthest(found.gradients, expected.gradients) <= 1e-6 * largest
    assert found.adapter.keys() == expected.adapter.keys()
    assert farthest(found.adapter, expected.adapter) <= 1e-5
    assert found.verdict == expected.verdict
    assert form(folder / kind / case.name) == form(own_folder)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", HALF, ids=lambda case: case.name)
def test_what_trains_stays_in_float32(case: Case, kind: str, worlds: Worlds) -> None:
    assert worlds(2)[0][kind, case.name].dtypes == {torch.float32}


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="nccl needs two graphics cards")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_two_graphics_cards_under_nccl_train_as_one(tmp_path: Path) -> None:
    cases = [Case("lora"), Case("adalora"), Case("hyperlora"), Case("full")]
    outcomes = world(2, KINDS, cases, tmp_path, accelerator="cuda")
    for case in cases:
        expected = trained(case, "auto", 1, tmp_path, accelerator="cuda")
        largest = max(gradient.abs().max().item() for gradient in expected.gradients.values())
        for kind in KINDS:
            found = outcomes[kind, case.name]
            assert farthest(found.gradients, expected.gradients) <= 1e-5 * largest
            assert farthest(found.adapter, expected.adapter) <= 1e-4


def farthest(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    return max((found[name].float() - value.float()).abs().max().item() for name, value in expected.items())


def form(folder: Path) -> tuple[str, dict[str, tuple[list[int], str]], dict[str, object]]:
    """The adapter's config, the names, shapes and formats of its tensors, and its record without their checksum."""
    record = json.loads((folder / "peftlight.json").read_text())
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        tensors = {name: (part.get_shape(), part.get_dtype()) for name, part in slices.items()}
    return (folder / "adapter_config.json").read_text(), tensors, {**record, "sha256": None}
