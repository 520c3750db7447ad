"""Images from folders, files that list them and the hub: which rows serve which stage, and what the numbers are."""

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from peftlight.data import Images
from peftlight.errors import UserError

Draw = Callable[..., Path]
PLAIN: dict[str, Any] = {"image_size": 8, "image_mean": [0.0, 0.0, 0.0], "image_std": [1.0, 1.0, 1.0]}


@pytest.fixture
def draw(tmp_path: Path) -> Draw:
    """Draws an image of random pixels, 8 x 8 unless told, at a path."""

    def draw(name: str, seed: int = 0, size: tuple[int, int] = (8, 8), **options: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(pixels).save(path, **options)
        return path

    return draw


def images(source: Path | str, **fields: Any) -> Images:
    return Images(source=str(source), **{**PLAIN, **fields})


def rows_of(loader: Any) -> dict[int, Any]:
    """Each row's pixels, and its label where it has one."""
    found = {}
    for batch in loader:
        for place, row in enumerate(batch["row"].tolist()):
            found[row] = (batch["pixel_values"][place], batch.get("labels", batch["row"])[place].item())
    return found


def pixels_of(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.asarray(Image.open(path).convert("RGB"), np.float32) / 255).permute(2, 0, 1)


def encoded(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def test_folders_of_splits_serve_their_stages(draw: Draw, tmp_path: Path) -> None:
    paths = [draw(f"d/train/{label}/{number}.png", seed) for seed, (label, number) in
             enumerate((label, number) for label in ("cat", "dog") for number in range(3))]  # fmt: skip
    draw("d/dev/dog/9.jpg", 9)
    draw("d/test/1.png", 10)
    (tmp_path / "d" / "README.md").write_text("notes")
    (tmp_path / "d" / "train" / ".DS_Store").write_bytes(b"x")
    data = images(tmp_path / "d", flip=False, batch_size=4)
    with pytest.warns(UserWarning, match="test uses the validation split.*named like their classes"):
        data.setup()
    assert data.label_names == ["cat", "dog"]
    found = rows_of(data.train_dataloader())
    assert [found[row][1] for row in range(6)] == [0, 0, 0, 1, 1, 1]
    for row, path in enumerate(paths):
        assert torch.allclose(found[row][0], pixels_of(path))
    assert str(data.summaries["train"]) == "6 images (3 cat, 3 dog)"
    assert str(data.summaries["validation"]) == "1 images (0 cat, 1 dog)"
    assert str(data.summaries["predict"]) == "1 images"
    (batch,) = data.predict_dataloader()
    assert batch["file"] == [str(tmp_path / "d" / "test" / "1.png")]
    assert "labels" not in batch
    (tested,) = data.test_dataloader()
    assert tested["labels"].tolist() == [1]


def test_without_splits_the_images_set_aside_depend_on_the_seed_alone(draw: Draw, tmp_path: Path) -> None:
    for number in range(20):
        draw(f"d/{'ab'[number % 2]}/{number}.png", number)

    def aside(seed: int, globally: int = 0) -> list[int]:
        torch.manual_seed(globally)
        np.random.seed(globally)
        data = images(tmp_path / "d", split_seed=seed, validation_size=0.25)
        data.setup("fit")
        trained, kept = rows_of(data.train_dataloader()), rows_of(data.val_dataloader())
        assert sorted([*trained, *kept]) == list(range(20))
        return sorted(kept)

    assert len(aside(1)) == 5
    assert aside(1) == aside(1, globally=7)
    assert aside(1) != aside(2)


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_file_lists_images_by_their_paths_as_seen_from_it(
    ending: str, draw: Draw, write: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    paths = [draw(f"d/photos/{number}.png", number) for number in range(4)]
    rows = [{"photo": f"photos/{number}.png", "kind": "ab"[number % 2]} for number in range(4)]
    table = "photo,kind\n" + "".join(f"{row['photo']},{row['kind']}\n" for row in rows)
    source = write(f"d/list.{ending}", rows if ending == "jsonl" else table)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    columns = {"image": "photo", "label": "kind"}
    data = images(source, columns=columns, validation_source=source, flip=False)
    data.setup("fit")
    found = rows_of(data.train_dataloader())
    assert [found[row][1] for row in range(4)] == [0, 1, 0, 1]
    for row, path in enumerate(paths):
        assert torch.allclose(found[row][0], pixels_of(path))
    first = data.fingerprint
    draw("d/photos/0.png", 99)  # the list is as it was, the image is not
    data.setup("fit")
    assert data.fingerprint != first


def test_images_of_the_hub_stay_encoded_in_their_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    names = ["zebra", "ape"]  # the hub's order, not that of the alphabet
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})

    def split(count: int) -> Any:
        cells = [{"bytes": encoded(number), "path": f"{number}.png"} for number in range(count)]
        return datasets.Dataset.from_dict({"image": cells, "label": [n % 2 for n in range(count)]}, features=features)

    monkeypatch.setattr(datasets, "load_dataset", lambda source, subset: {"train": split(6), "test": split(2)})
    data = images("someone/animals", validation_size=2, flip=False)
    data.setup()
    assert data.label_names == names
    found = {**rows_of(data.train_dataloader()), **rows_of(data.val_dataloader())}
    assert [found[row][1] for row in range(6)] == [0, 1, 0, 1, 0, 1]
    for row in range(6):
        expected = np.asarray(Image.open(io.BytesIO(encoded(row))), np.float32) / 255
        assert torch.allclose(found[row][0], torch.from_numpy(expected).permute(2, 0, 1))
    (batch,) = data.predict_dataloader()
    assert batch["file"] == ["0.png", "1.png"]


def test_the_processor_of_a_folder_is_followed(draw: Draw, tmp_path: Path) -> None:
    """Resizing the shorter side, cropping the middle and normalising, against Pillow and numpy by hand."""
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "preprocessor_config.json").write_text(
        '{"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 8}, "crop_pct": 0.5, '
        f'"image_mean": {mean}, "image_std": {std}, "resample": 3}}'
    )
    path = draw("d/a/1.png", 1, size=(24, 12))
    draw("d/b/1.png", 2, size=(12, 24))
    data = Images(
        source=str(tmp_path / "d"), predict_source=str(path), image_processor=str(tmp_path / "p"), validation_size=1
    )
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    resized = Image.open(path).resize((32, 16), Image.Resampling.BICUBIC)  # 8 / 0.5 along the shorter side
    scaled = np.asarray(resized.crop((12, 4, 20, 12)), np.float32) / 255
    expected = ((scaled - np.float32(mean)) / np.float32(std)).transpose(2, 0, 1)
    assert batch["pixel_values"].shape == (1, 3, 8, 8)
    assert np.abs(batch["pixel_values"][0].numpy() - expected).max() < 1e-5


def test_the_plain_transform_is_that_of_a_vit(draw: Draw) -> None:
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    from peftlight.data.image_transform import Plain

    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    image = Image.open(draw("a.png", 3, size=(21, 13)))
    theirs = ViTImageProcessorPil(size={"height": 10, "width": 10}, image_mean=mean, image_std=std)
    expected = theirs(images=image, return_tensors="pt")["pixel_values"][0]
    assert torch.allclose(Plain(10, mean, std)(image), expected, atol=1e-6)


def test_only_training_images_are_mirrored_and_about_half_of_them(draw: Draw, tmp_path: Path) -> None:
    for number in range(40):
        draw(f"d/{'ab'[number % 2]}/{number}.png", 7)
    straight = pixels_of(tmp_path / "d" / "a" / "0.png")
    torch.manual_seed(0)

    def mirrored(data: Images, loader: str) -> list[bool]:
        data.setup("fit")
        found = [pixels for pixels, _ in rows_of(getattr(data, loader)()).values()]
        assert all(torch.equal(p, straight) or torch.equal(p, straight.flip(-1)) for p in found)
        return [not torch.equal(pixels, straight) for pixels in found]

    flipped = mirrored(images(tmp_path / "d", validation_size=10), "train_dataloader")
    assert 5 < sum(flipped) < 25
    assert not any(mirrored(images(tmp_path / "d", validation_size=10), "val_dataloader"))
    assert not any(mirrored(images(tmp_path / "d", validation_size=10, flip=False), "train_dataloader"))


def test_images_come_upright_and_in_three_channels(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    image = Image.fromarray(pixels)
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter turn to the right is to be made
    image.save(folder / "1.png", exif=turned)
    image.convert("L").save(folder / "2.png")
    image.convert("RGBA").save(folder / "3.png")
    image.quantize(8).save(folder / "4.png", transparency=b"\x00\xff")
    data = images("sample:shapes", predict_source=str(folder))
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    upright = np.asarray(image.rotate(-90), np.float32).transpose(2, 0, 1) / 255
    assert np.allclose(batch["pixel_values"][0].numpy(), upright)
    grey = np.asarray(image.convert("L"), np.float32) / 255
    assert np.allclose(batch["pixel_values"][1].numpy(), np.stack([grey] * 3))
    assert np.allclose(batch["pixel_values"][2].numpy(), pixels.transpose(2, 0, 1) / 255)
    few = np.asarray(image.quantize(8).convert("RGB"), np.float32).transpose(2, 0, 1) / 255
    assert np.allclose(batch["pixel_values"][3].numpy(), few)


def test_the_sample_is_balanced_and_the_same_every_time() -> None:
    data = images("sample:shapes", image_size=32, flip=False, validation_size=60)
    data.setup("fit")
    found = {**rows_of(data.train_dataloader()), **rows_of(data.val_dataloader())}
    assert data.label_names == ["circle", "square", "triangle"]
    assert [found[row][1] for row in range(6)] == [0, 1, 2, 0, 1, 2]
    for row in range(6):  # the middle of the pixels that stand out has the colour of its class
        pixels = found[row][0]
        bright = pixels.max(0).values > 0.5
        assert 40 < bright.sum() < 500
        assert pixels[:, bright].mean(1).argmax() == row % 3
    again = images("sample:shapes", image_size=32, validation_size=60)
    again.setup("fit")
    assert again.fingerprint == data.fingerprint


def test_all_images_are_checked_once_and_again_when_one_changes(
    draw: Draw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peftlight.data import image_decoding

    for number in range(6):
        draw(f"d/{'ab'[number % 2]}/{number}.png", number)
    counted: list[str] = []
    examined = image_decoding._examined
    monkeypatch.setattr(image_decoding, "_examined", lambda image: counted.append(image.name) or examined(image))

    def fingerprint() -> str:
        data = images(tmp_path / "d", validation_size=1)
        data.setup("fit")
        return data.fingerprint

    first = fingerprint()
    assert len(counted) == 6
    assert fingerprint() == first
    assert len(counted) == 6
    os.utime(tmp_path / "d" / "a" / "0.png", ns=(1, 1))
    assert fingerprint() == first  # another time, the same content
    assert len(counted) == 12
    draw("d/a/0.png", 77)
    assert fingerprint() != first


def test_workers_give_the_same_images(draw: Draw, tmp_path: Path) -> None:
    for number in range(6):
        draw(f"d/{'ab'[number % 2]}/{number}.png", number)
    found = []
    for workers in (0, 2):
        data = images(tmp_path / "d", validation_source=str(tmp_path / "d"), num_workers=workers, batch_size=2)
        data.setup("validate")
        found.append(torch.cat([batch["pixel_values"] for batch in data.val_dataloader()]))
    assert torch.equal(*found)


DEEP = io.BytesIO()
Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8)).save(DEEP, "PNG")
TWO = {"d/a/1.png": encoded(1), "d/b/1.png": encoded(2)}
SPLIT = {f"d/train/{name}/1.png": encoded(1) for name in "ab"}

BAD: dict[str, tuple[dict[str, Any], str, dict[str, Any], list[str]]] = {
    "cut off": ({**TWO, "d/a/2.png": encoded(3)[:90]}, "d", {}, ["1 of 3 images", "d/a/2.png", "replace or remove"]),
    "no image": ({**TWO, "d/a/2.png": b"hello", "d/b/3.png": b""}, "d", {},
                 ["2 of 4 images", "d/a/2.png: it is of no known format", "d/b/3.png: it is empty"]),
    "deep": ({**TWO, "d/a/2.png": DEEP.getvalue()}, "d", {}, ["d/a/2.png", "more than 8 bits", "I;16"]),
    "empty class": ({**TWO, "d/c/.hidden": b""}, "d", {}, ["d/c holds no image"]),
    "only hidden": ({"d/.hidden": b""}, "d", {}, ["d holds neither images", ".png"]),
    "stray file": ({**TWO, "d/b/notes.txt": b"x"}, "d", {}, ["d/b: notes.txt is no image", ".png"]),
    "beside classes": ({**TWO, "d/1.png": encoded(1)}, "d", {}, ["d: 1.png lies beside", "a, b"]),
    "one class": ({"d/a/1.png": encoded(1)}, "d", {}, ["every row has the label 'a'"]),
    "no classes": ({"d/1.png": encoded(1)}, "d", {}, ["d holds images, but no folders", "d/CLASS/*.png"]),
    "only in validation": ({**SPLIT, "d/val/c/1.png": encoded(1)}, "d", {},
                           ["d/val/c/1.png: unknown label 'c'", "a, b"]),
    "misspelt class": ({"d/train/cat/1.png": encoded(1), "d/train/dog/1.png": encoded(1),
                        "d/val/cats/1.png": encoded(1)}, "d", {}, ["d/val/cats/1.png", "Did you mean 'cat'"]),
    "unclear folder": ({**SPLIT, "d/more/a/1.png": encoded(1)}, "d", {}, ["beside train", "more", "split"]),
    "missing file": ({**TWO, "l.csv": "image,label\nd/a/1.png,a\nd/b/2.png,b\n"}, "l.csv", {},
                     ["l.csv, line 3", "no image", "d/b/2.png", "Did you mean '1.png'"]),
    "missing folder": ({**TWO, "l.csv": "image,label\nd/a/1.png,a\ne/2.png,b\n"}, "l.csv", {},
                       ["l.csv, line 3", "folder e does not exist"]),
    "listed but broken": ({"1.png": b"no", "2.png": encoded(1), "l.csv": "image,label\n1.png,a\n2.png,b\n"}, "l.csv",
                          {"validation_size": 1}, ["l.csv, line 2 (1.png): it is of no known format"]),
    "not a path": ({"l.jsonl": [{"image": 3, "label": "a"}]}, "l.jsonl", {}, ["l.jsonl, line 1", "3 (int)", "path"]),
    "other columns": ({"l.jsonl": [{"photo": "a.png", "kind": "a"}]}, "l.jsonl", {},
                      ["no column 'image' and no column 'label'", "photo, kind"]),
    "unknown sample": ({}, "sample:shape", {}, ["'shape'", "Did you mean 'shapes'"]),
    "validation size": (TWO, "d", {"validation_size": 2}, ["validation_size=2", "there are 2"]),
    "one name": (TWO, "d", {"labels": ["a"]}, ["labels", "two"]),
    "name not given": (TWO, "d", {"labels": ["a", "c"], "validation_size": 1}, ["d/b/1.png: unknown label 'b'"]),
    "size alone": (TWO, "d", {"image_mean": None}, ["image_size", "image_mean is missing"]),
    "mean of one": (TWO, "d", {"image_mean": [0.5]}, ["three numbers", "[0.5]"]),
    "no size": (TWO, "d", {"image_size": 0}, ["image_size", "0"]),
    "both": (TWO, "d", {"image_processor": "x"}, ["image_processor", "not both"]),
    "unknown processor": (TWO, "d", {"image_processor": "./nowhere", "image_size": None, "image_mean": None,
                                     "image_std": None}, ["image processor './nowhere'"]),
    "no model": (TWO, "d", {"image_size": None, "image_mean": None, "image_std": None},
                 ["no model", "data.image_processor"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, write: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, source, fields, parts = BAD[case]
    for name, content in files.items():
        write(name, content)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        images(source, **{"validation_size": 1, **fields}).setup("fit")
    message = str(error.value)
    for part in parts:
        assert part in message


def test_images_of_different_sizes_make_no_batch(draw: Draw, tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "preprocessor_config.json").write_text(
        '{"image_processor_type": "ViTImageProcessor", "do_resize": false}'
    )
    draw("d/1.png", size=(8, 8))
    draw("d/2.png", size=(9, 8))
    data = Images(source="sample:shapes", predict_source=str(tmp_path / "d"), image_processor=str(tmp_path / "p"))
    data.setup("predict")
    with pytest.raises(UserError, match=r"different sizes.*\(3, 8, 8\), \(3, 8, 9\).*data\.image_size"):
        next(iter(data.predict_dataloader()))


def test_an_image_that_breaks_after_the_check_names_its_file(draw: Draw, tmp_path: Path) -> None:
    path = draw("d/1.png")
    data = images("sample:shapes", predict_source=str(tmp_path / "d"))
    data.setup("predict")
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(UserError, match=r"d/1\.png: the image cannot be decoded"):
        next(iter(data.predict_dataloader()))
