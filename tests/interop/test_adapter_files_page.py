"""docs/adapter-files.md shows what is really saved."""

import json
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file

from models import make
from peftlight import PEFTStrategy, attach, save_adapter
from peftlight.interop import Record
from peftlight.interop.metadata import BaseRecord
from peftlight.strategies import BottleneckAdapter, Compacter

PAGE = (Path(__file__).parents[2] / "docs" / "adapter-files.md").read_text(encoding="utf-8")
SHAPES = dict(re.findall(r"^\| `(bert\..+|classifier\..+)` \| (\(.+\)) \|$", PAGE, re.MULTILINE))


@pytest.mark.parametrize(("kind", "heads"), [(BottleneckAdapter, ["classifier"]), (Compacter, [])])
def test_names_and_shapes(kind: type[PEFTStrategy], heads: list[str], tmp_path: Path) -> None:
    options: dict[str, object] = {"variant": "pfeiffer", "reduction_factor": 4, "layers": [0]}
    save_adapter(attach(make("bert"), kind(**options), modules_to_train=heads), tmp_path)
    found = {key: str(tuple(value.shape)) for key, value in load_file(tmp_path / "adapter_model.safetensors").items()}
    assert found.items() <= SHAPES.items()
    if kind is BottleneckAdapter:
        shown = json.loads(PAGE.partition("```json")[2].partition("```")[0])
        assert shown == json.loads((tmp_path / "adapter_config.json").read_text())
        assert found.keys() == {key for key in SHAPES if "rule" not in key and not re.search(r"\.[st]$", key)}


def test_every_field_of_the_record_is_explained() -> None:
    fields = [*Record.__dataclass_fields__, *(f"base.{name}" for name in BaseRecord.__dataclass_fields__)]
    assert [name for name in fields if not re.search(rf"`{re.escape(name)}(\.\w+)?`", PAGE)] == []
