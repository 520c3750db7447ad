"""What leaves this machine holds no path of it."""

import json
from pathlib import Path
from typing import Any

import pytest

from models import make
from peftlight import attach, save_adapter
from peftlight.errors import UserError
from peftlight.handover.public_names import paths_in, without_folders
from peftlight.handover.publishing import Publication, publication
from peftlight.strategies import LoRA, PromptTuning

BASE = "someone/a-llama"


def content_of(found: Publication) -> dict[str, bytes]:
    return {name: value if isinstance(value, bytes) else value.read_bytes() for name, value in found.files.items()}


def test_paths_in_config_and_record_stay_here(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    data = {"source": "clients/acme/secret.csv", "fingerprint": "x", "note": "file:///home/jane/rows.csv"}
    save_adapter(attach(make("llama"), PromptTuning(num_virtual_tokens=3, compat="peft")), folder, {"data": data})
    config = json.loads((folder / "adapter_config.json").read_text())
    told = {"tokenizer_name_or_path": str(tmp_path / "base"), "base_model_name_or_path": "models/of/mine"}
    (folder / "adapter_config.json").write_text(json.dumps({**config, **told}))
    found = publication(folder, BASE)
    files = content_of(found)
    assert json.loads(files["adapter_config.json"]) == {
        **config, "tokenizer_name_or_path": "base", "base_model_name_or_path": BASE,
    }  # fmt: skip
    assert json.loads(files["peftlight.json"])["data"] == {"source": "secret.csv", "fingerprint": "x",
                                                           "note": "rows.csv"}  # fmt: skip
    for secret in (str(tmp_path), "clients", "jane", "models/of"):
        assert not any(secret.encode() in content for name, content in files.items() if name != "README.md"), secret
        assert secret.encode() not in files["README.md"]
    assert any("tokenizer_name_or_path" in remark for remark in found.remarks)


@pytest.mark.parametrize(
    ("value", "public"),
    [
        ({"source": "someone/rows"}, {"source": "someone/rows"}),
        ({"source": "sample:quotes"}, {"source": "sample:quotes"}),
        ({"source": "a/b/c.csv", "seed": 3}, {"source": "c.csv", "seed": 3}),
        ({"base": {"name": "../mine"}}, {"base": {"name": "mine"}}),
        ({"tokenizer": None, "note": "a/b/c"}, {"tokenizer": None, "note": "a/b/c"}),
        ({"note": ["/a/b", "~/c", "C:\\d\\e", "file:///f/g"]}, {"note": ["b", "c", "e", "g"]}),
    ],
)
def test_names(value: Any, public: Any) -> None:
    assert without_folders(value) == public


def test_a_persons_card_with_paths_of_this_machine_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    save_adapter(attach(make("llama"), LoRA(rank=2)), folder)
    for text in (
        f"base_model: {tmp_path}/base\n", f"- base_model:adapter:{tmp_path}\n", f"see `{tmp_path}`.",
        "from /home/jane/rows.csv", "file:///data/rows.csv", r"in C:\Users\jane\rows.csv",
    ):  # fmt: skip
        (folder / "README.md").write_text(text)
        if "base" in text and "adapter" not in text:
            (tmp_path / "base").mkdir()
        with pytest.raises(UserError, match=r"README\.md would tell everybody paths of this machine: "):
            publication(folder, BASE)
    harmless = "# Mine\nhttps://huggingface.co/someone/x and/or `a/b` ~/.cache/nothing /usr/bin/env 1/2 /nowhere/at/all"
    (folder / "README.md").write_text(harmless)
    assert content_of(publication(folder, BASE))["README.md"].decode() == harmless
    assert paths_in(harmless) == []
