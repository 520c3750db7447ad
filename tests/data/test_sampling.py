"""The order of an epoch: the same rows in each global batch however it is divided, and from any batch on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import BatchSampler

from peftlight.data import Images, TextClassification
from peftlight.data.sampling import EpochSampler, InOrder, Place, Sampled

SEED = 2**63 + 5  # torch's own seeds may be as large


def sampler(rows: int, processes: int = 1, rank: int = 0, shuffle: bool = True) -> EpochSampler:
    return EpochSampler(rows, lambda: SEED, shuffle, {"num_replicas": processes, "rank": rank})


def global_batches(rows: int, processes: int, size: int, epoch: int = 3) -> list[list[int]]:
    """The rows that count in each batch of all processes together."""
    shares: list[Any] = [sampler(rows, processes, rank) for rank in range(processes)]
    for share in shares:
        share.set_epoch(epoch)
    batches = zip(*(BatchSampler(share, size, drop_last=False) for share in shares), strict=True)
    return [sorted(place.row for part in parts for place in part if place.counted) for parts in batches]


@pytest.mark.parametrize("rows", [1, 3, 7, 8, 9, 13, 16, 30])
def test_every_layout_of_processes_has_the_same_rows_in_each_batch(rows: int) -> None:
    alone = global_batches(rows, 1, 8)
    assert sorted(row for batch in alone for row in batch) == list(range(rows))
    assert global_batches(rows, 2, 4) == global_batches(rows, 4, 2) == global_batches(rows, 8, 1) == alone


@pytest.mark.parametrize(("rows", "processes"), [(1, 4), (7, 2), (9, 4), (12, 4)])
def test_all_processes_have_as_many_rows_and_each_row_counts_once(rows: int, processes: int) -> None:
    shares = [list(sampler(rows, processes, rank)) for rank in range(processes)]
    assert {len(share) for share in shares} == {-(-rows // processes)} == {len(sampler(rows, processes))}
    assert sorted(place.row for share in shares for place in share if place.counted) == list(range(rows))


def test_the_order_is_that_of_seed_and_epoch_and_of_nothing_else() -> None:
    torch.manual_seed(1)
    one = sampler(50)
    first = [place.row for place in one]
    torch.rand(7)
    assert [place.row for place in one] == first
    one.set_epoch(1)
    second = [place.row for place in one]
    assert second != first
    other = EpochSampler(50, lambda: SEED + 1, True, {"num_replicas": 1, "rank": 0})
    assert [place.row for place in other] not in (first, second)  # nor that of the epoch before


@pytest.mark.parametrize("rank", [0, 1])
def test_an_epoch_may_begin_later_and_is_as_long_as_ever(rank: int) -> None:
    share = sampler(13, 2, rank)
    share.set_epoch(4)
    whole = list(share)
    share.begin(4, 3)
    assert list(share) == whole[3:]
    assert len(share) == 7
    share.set_epoch(4)  # as Lightning does once more
    assert list(share) == whole[3:]
    share.set_epoch(5)
    assert len(list(share)) == 7


def test_rows_in_order_are_known_as_such() -> None:
    assert [place.row for place in InOrder(5, lambda: SEED, False)] == [0, 1, 2, 3, 4]


class Noise(torch.utils.data.Dataset[dict[str, Any]]):
    """Rows with something random about them."""

    def __len__(self) -> int:
        return 9

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"labels": np.array([index, index]), "noise": torch.rand(())}


def test_what_is_random_about_a_row_follows_from_seed_epoch_and_row_and_moves_nothing_else() -> None:
    rows, before = Sampled(Noise()), torch.get_rng_state()
    noise = rows[Place(3, (SEED, 0), True)]["noise"]
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert torch.equal(rows[Place(3, (SEED, 0), True)]["noise"], noise)
    others = [Place(4, (SEED, 0), True), Place(3, (SEED, 1), True), Place(3, (SEED + 1, 0), True)]
    assert all(not torch.equal(rows[place]["noise"], noise) for place in others)


def test_a_row_that_fills_up_has_no_labels() -> None:
    assert Sampled(Noise())[Place(3, (SEED, 0), False)]["labels"].tolist() == [-100, -100]
    assert Sampled(Noise())[Place(3, (SEED, 0), True)]["labels"].tolist() == [3, 3]
    single = Sampled([{"labels": 2, "row": 0}])  # type: ignore[arg-type]
    assert single[Place(0, (SEED, 0), False)] == {"labels": -100, "row": 0}


def test_loading_draws_no_random_numbers(bpe: Callable[..., Any], write: Callable[..., str]) -> None:
    rows = [{"text": f"film {place}", "label": place % 2} for place in range(40)]
    data = TextClassification(source=write("a.json", rows), tokenizer=bpe(), validation_size=8)
    data.setup("fit")
    before = torch.get_rng_state()
    assert len([*data.train_dataloader(), *data.val_dataloader()]) == 5
    assert torch.equal(torch.get_rng_state(), before)


def test_another_seed_is_another_order_and_a_checkpoint_brings_its_own(
    bpe: Callable[..., Any], write: Callable[..., str]
) -> None:
    source, tokenizer = write("a.json", [{"text": f"film {place}", "label": place % 2} for place in range(40)]), bpe()

    def order(seed: int, state: dict[str, Any] | None = None) -> tuple[list[int], dict[str, Any]]:
        torch.manual_seed(seed)
        data = TextClassification(source=source, tokenizer=tokenizer, validation_size=8)
        data.setup("fit")
        data.load_state_dict(state or {})
        return [row for batch in data.train_dataloader() for row in batch["row"].tolist()], data.state_dict()

    first, state = order(1)
    assert order(1)[0] == first != order(2)[0]
    assert order(2, state)[0] == first


def mirrored(folder: Path, workers: int, epoch: int) -> dict[int, bool]:
    """By its row, whether each image was mirrored; in the second epoch of persistent workers, if there are any."""
    torch.manual_seed(5)
    data = Images(source=str(folder), validation_size=4, image_size=8, image_mean=[0.0] * 3, image_std=[1.0] * 3,
                  num_workers=workers)  # fmt: skip
    data.setup("fit")
    loader = data.train_dataloader()
    for number in range(epoch + 1):
        loader.sampler.set_epoch(number)  # type: ignore[attr-defined]
        torch.rand(3)
        batches = list(loader)
    return {
        row: bool(pixels[0, 0, 0] > 0.5)
        for batch in batches
        for row, pixels in zip(batch["row"].tolist(), batch["pixel_values"], strict=True)
    }


@pytest.mark.slow
def test_images_are_mirrored_alike_with_any_number_of_workers(tmp_path: Path) -> None:
    for number in range(24):
        image = Image.new("RGB", (8, 8))
        image.paste((255, 255, 255), (4, 0, 8, 8))
        path = tmp_path / "d" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    alone, later = mirrored(tmp_path / "d", 0, 0), mirrored(tmp_path / "d", 0, 1)
    assert 3 < sum(alone.values()) < 17
    assert alone != later
    assert mirrored(tmp_path / "d", 2, 0) == alone
    assert mirrored(tmp_path / "d", 2, 1) == later
