"""Image classification on a tiny ViT: what it learns, what it logs, what it predicts, and what it refuses."""

from pathlib import Path
from typing import Any

import pytest
import torch

from models import make
from peftlight.data import Images, TextClassification
from peftlight.errors import UserError
from peftlight.strategies import Full, LoRA
from peftlight.strategy import PEFTStrategy
from peftlight.tasks import ImageClassification, SequenceClassification
from tasks.small import QUIET, loader, quiet_trainer, stirred

pytestmark = QUIET

NAMES = ["circle", "square", "triangle"]
PLAIN: dict[str, Any] = {"image_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def adam(rate: float) -> Any:
    return lambda parameters: torch.optim.AdamW(parameters, lr=rate)


def base(folder: Path, processor: bool = True) -> str:
    """A ViT without a head, and the image processor that belongs to it."""
    make("vit").vit.save_pretrained(folder / "base")
    if processor:
        size = '{"height": 16, "width": 16}'
        (folder / "base" / "preprocessor_config.json").write_text(
            f'{{"image_processor_type": "ViTImageProcessor", "size": {size}}}'
        )
    return str(folder / "base")


@pytest.mark.parametrize(
    ("strategy", "rate"), [(LoRA(rank=4, target_modules="all-linear"), 5e-3), (Full(), 1e-3)], ids=["LoRA", "Full"]
)
def test_two_epochs_on_the_sample_beat_chance_clearly(strategy: PEFTStrategy, rate: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = ImageClassification(base(tmp_path), strategy, optimizer=adam(rate))
    data = Images(source="sample:shapes", validation_size=90, batch_size=6)
    trainer = quiet_trainer(tmp_path, max_epochs=2)
    trainer.fit(module, data)
    assert module.label_names == NAMES
    assert module.model is not None
    assert module.model.config.id2label == dict(enumerate(NAMES))
    assert trainer.callback_metrics["val_accuracy"] > 0.6  # chance is 0.33, its standard error here 0.05


def test_metrics_equal_those_by_hand(tmp_path: Path) -> None:
    module = ImageClassification(make("vit"), LoRA(rank=2), label_names=NAMES)
    module.configure_model()
    assert module.adapter is not None
    stirred(module.adapter)
    generator = torch.Generator().manual_seed(0)
    pixels, labels = torch.randn(30, 3, 16, 16, generator=generator), torch.arange(30) % 3
    with torch.no_grad():
        scores = module.model(pixel_values=pixels).logits.double()  # type: ignore[misc]
        module.model.classifier.bias -= scores.mean(0)  # type: ignore[union-attr]
        scores -= scores.mean(0)
    guesses = scores.argmax(-1)
    assert len(guesses.unique()) == 3
    f1 = []
    for label in range(3):
        hits = ((guesses == label) & (labels == label)).sum()
        f1.append(float(2 * hits / ((guesses == label).sum() + (labels == label).sum())))
    batches = [{"pixel_values": pixels[part], "labels": labels[part]} for part in (slice(0, 7), slice(7, 30))]
    (found,) = quiet_trainer(tmp_path).validate(module, loader(batches), verbose=False)
    assert found == pytest.approx({
        "val_loss": -float(scores.log_softmax(-1)[range(30), labels].mean()),
        "val_accuracy": float((guesses == labels).float().mean()),
        "val_f1": sum(f1) / 3,
    }, abs=1e-5)  # fmt: skip


def test_each_image_is_predicted_with_its_file(tmp_path: Path) -> None:
    module = ImageClassification(make("vit"), LoRA(rank=2), label_names=NAMES)
    data = Images(source="sample:shapes", batch_size=50, validation_size=120, **PLAIN)
    parts = quiet_trainer(tmp_path).predict(module, data)
    assert parts is not None
    records = [record for part in parts for record in part]
    files = [record["file"] for record in records]
    assert len(set(files)) == 120
    for record in records:
        kind, number = record["file"].removesuffix(".ppm").split("-")
        assert (int(number), NAMES[record["id"] % 3]) == (record["id"], kind)
        assert list(record["probabilities"]) == NAMES
        assert sum(record["probabilities"].values()) == pytest.approx(1)
        assert (
            record["probability"] == record["probabilities"][record["label"]] == max(record["probabilities"].values())
        )
    (batch, *_) = data.predict_dataloader()
    with torch.no_grad():
        expected = module.eval()(pixel_values=batch["pixel_values"]).logits.softmax(-1)
    assert list(records[3]["probabilities"].values()) == pytest.approx(expected[3].tolist(), abs=1e-6)


def test_a_checkpoint_gives_the_same_predictions(tmp_path: Path) -> None:
    module = ImageClassification(base(tmp_path), LoRA(rank=2), optimizer=adam(1e-2))
    data = Images(source="sample:shapes", validation_size=20, batch_size=20)
    trainer = quiet_trainer(tmp_path, max_steps=3)
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = ImageClassification.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    first, second = (quiet_trainer(tmp_path).predict(each, data) for each in (module, again))
    assert first == second
    assert again.label_names == NAMES


def test_a_head_for_other_classes_gives_way_only_when_told(tmp_path: Path) -> None:
    made = make("vit")
    made.classifier = torch.nn.Linear(32, 10)
    made.config.num_labels = 10  # type: ignore[union-attr]
    made.save_pretrained(tmp_path / "ten")  # type: ignore[operator]
    data = Images(source="sample:shapes", validation_size=20, batch_size=20, **PLAIN)
    with pytest.raises(UserError, match=r"classifier\.(weight|bias) is \(10.*--model\.new_head true"):
        quiet_trainer(tmp_path).fit(ImageClassification(str(tmp_path / "ten"), LoRA(rank=2)), data)
    module = ImageClassification(str(tmp_path / "ten"), LoRA(rank=2), new_head=True)
    trainer = quiet_trainer(tmp_path, max_steps=3)
    trainer.fit(module, data)
    assert module.adapter is not None
    assert {"classifier.weight", "classifier.bias"} <= set(module.adapter.parameters())
    assert module.model.classifier.weight.shape == (3, 32)  # type: ignore[union-attr]
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = ImageClassification.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    first, second = (quiet_trainer(tmp_path).predict(each, data) for each in (module, again))
    assert first == second


def test_images_of_another_size_than_the_models_are_refused_before_training(tmp_path: Path) -> None:
    module = ImageClassification(base(tmp_path), LoRA(rank=2))
    data = Images(source="sample:shapes", **{**PLAIN, "image_size": 20})
    with pytest.raises(UserError, match=r"refuses images of 20 x 20 pixels.*16\*16.*data\.image_size"):
        quiet_trainer(tmp_path, num_sanity_val_steps=1).fit(module, data)


def test_without_an_image_processor_the_fields_are_asked_for(tmp_path: Path) -> None:
    module = ImageClassification(base(tmp_path, processor=False), LoRA(rank=2))
    with pytest.raises(UserError, match=r"image processor(.|\n)*set data\.image_size, data\.image_mean and data\.im"):
        quiet_trainer(tmp_path).fit(module, Images(source="sample:shapes"))
    given = ImageClassification(make("vit"), LoRA(rank=2))
    with pytest.raises(UserError, match=r"given as an object.*data\.image_processor"):
        quiet_trainer(tmp_path).fit(given, Images(source="sample:shapes"))


def test_images_and_texts_are_not_mistaken_for_each_other(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="ImageClassification"):
        quiet_trainer(tmp_path).fit(SequenceClassification(make("bert"), LoRA(rank=2)), Images(source="sample:shapes"))
    source = tmp_path / "a.csv"
    source.write_text("text,label\ngood,1\nbad,0\nfine,1\n")
    with pytest.raises(UserError, match="tokenizer"):
        quiet_trainer(tmp_path).fit(
            ImageClassification(base(tmp_path), LoRA(rank=2)), TextClassification(source=str(source), validation_size=1)
        )
