"""The command lines that serve an adapter, or the model that it was merged into, with vLLM and with llama.cpp.

What the two can load was read off their sources (vLLM's `lora/peft_helper.py` and `lora/lora_model.py`, llama.cpp's
`convert_lora_to_gguf.py`, 2026). Both know A and B on linear layers and refuse other tensors. Both take one alpha for
all layers, vLLM one rank as well, and llama.cpp does not read `use_rslora`: they would serve such an adapter with wrong
numbers, without a word. It is merged first.
"""

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from peftlight.errors import UserError, listed, one_line
from peftlight.handover.public_names import is_hub_id
from peftlight.interop.contents import Config
from peftlight.interop.folder import CONFIG, OF_RUN, find_adapter, read_record
from peftlight.interop.json_files import read_json
from peftlight.interop.metadata import BaseRecord
from peftlight.interop.tensor_files import TENSORS, check_names
from peftlight.strategies.lora import FROM_WEIGHT

MODEL_CONFIG = "config.json"
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as --max-lora-rank in all its versions."""
_PLAIN = re.compile(r".*(?<!lm_head)\.lora_[AB]\.weight")
"""Outputs tied to the embedding are left out: neither serves an adapter there for every model."""
_LANGUAGE_MODEL = re.compile(r".*(ForCausalLM|LMHeadModel)")


def serving_lines(folder: str | Path) -> list[str]:
    """Lines for a shell that serve the adapter in `folder`, or the merged model there; remarks begin with "# ".

    Args:
        folder: of an adapter, of the run that trained it, or what `peftlight merge` wrote.

    Raises:
        UserError: there is neither an adapter nor a model, or its files are damaged.
    """
    folder = Path(folder)
    lines = _of_model(folder) if (folder / MODEL_CONFIG).is_file() else _of_adapter(find_adapter(folder))
    return [one_line(line) if line.startswith("#") else line for line in lines]


def _of_adapter(folder: Path) -> list[str]:
    config, record = read_json(folder / CONFIG), read_record(folder)
    base = record.base
    if not _writes_text(config, base):
        return [
            f"# vLLM and llama.cpp serve language models; this is {_kind(config, base)}: peftlight predict runs it."
        ]
    name, path = _name_of(folder), shlex.quote(str(folder))
    if record.folds is False or "num_virtual_tokens" in config:  # the latter in HF PEFT's, which may have no record
        return [f"# Neither vLLM nor llama.cpp can serve {config['peft_type']}, nor can it be merged into the base.",
                f"peftlight chat {path}"]  # fmt: skip
    odd = [*_odd_tensors(folder / TENSORS), *_odd_settings(config), *_odd_base(base)]
    ranks = [rank for rank in _RANKS if rank >= _rank(config)]
    by_vllm = [*odd, *_odd_ranks(config), *([] if ranks else [f"a rank of {_rank(config)}, beyond {_RANKS[-1]}"])]
    by_llama = [*odd, *(["rsLoRA's scale"] if config.get("use_rslora") else [])]
    lines = [] if by_vllm else ["# vLLM", *_vllm(base, name, folder, ranks[0])]
    lines += [] if by_llama else ["# llama.cpp, cloned into this folder", *_llama(base, name, path)]
    if by_vllm or by_llama:
        lines += _merged_first(name, path, by_vllm, by_llama)
    return [*lines, *_remark_on_code(base)]


def model_config(folder: Path) -> dict[str, Any]:
    """What transformers wrote of a model; it may hold numbers that our own files may not.

    Raises:
        UserError: it is damaged.
    """
    try:
        config = json.loads((folder / MODEL_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / MODEL_CONFIG} is not JSON: {error}.") from None
    return config if isinstance(config, dict) else {}


def architecture_of(config: Mapping[str, Any]) -> str:
    """The class of transformers that the model's config names first; empty if it names none."""
    named = config.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else ""


def _of_model(folder: Path) -> list[str]:
    architecture = architecture_of(model_config(folder)) or "of an unknown class"
    if not _LANGUAGE_MODEL.fullmatch(architecture):
        return [f"# vLLM and llama.cpp serve language models; this is {architecture}."]
    return ["# vLLM", f"vllm serve {shlex.quote(str(folder))}",
            "# llama.cpp, cloned into this folder", *_converted(str(folder), _name_of(folder))]  # fmt: skip


def _writes_text(config: Config, base: BaseRecord) -> bool:
    return _kind(config, base) in ("AutoModelForCausalLM", "CAUSAL_LM")


def _kind(config: Config, base: BaseRecord) -> str:
    return base.auto_class or str(config.get("task_type") or "an adapter that does not say its task")


def _vllm(base: BaseRecord, name: str, folder: Path, rank: int) -> list[str]:
    pinned = f" --revision {shlex.quote(base.revision)}" if base.revision else ""
    adapter = shlex.quote(f"{name}={folder}")
    given = f"--enable-lora --lora-modules {adapter} --max-lora-rank {rank}"
    return [f"vllm serve {shlex.quote(str(base.name))}{pinned} {given}"]


def _llama(base: BaseRecord, name: str, path: str) -> Iterator[str]:
    local = str(base.name)
    if is_hub_id(local):
        pinned = f" --revision {shlex.quote(base.revision)}" if base.revision else ""
        yield f"hf download {shlex.quote(local)}{pinned} --local-dir base"
        local = "base"
    yield f"python llama.cpp/convert_hf_to_gguf.py {shlex.quote(local)} --outfile base.gguf"
    yield f"python llama.cpp/convert_lora_to_gguf.py {path} --base {shlex.quote(local)} --outfile {name}.gguf"
    yield f"llama-server -m base.gguf --lora {name}.gguf"


def _merged_first(name: str, path: str, by_vllm: list[str], by_llama: list[str]) -> Iterator[str]:
    who = " and ".join([*(["vLLM"] if by_vllm else []), *(["llama.cpp"] if by_llama else [])])
    why = listed(dict.fromkeys([*by_vllm, *by_llama]), 3)
    yield f"# For {who} it is merged first, which takes care of {why}"
    yield f"peftlight merge {path} {name}-merged"
    if by_vllm:
        yield f"vllm serve {name}-merged"
    if by_llama:
        yield from _converted(f"{name}-merged", name)


def _converted(model: str, name: str) -> list[str]:
    return [
        f"python llama.cpp/convert_hf_to_gguf.py {shlex.quote(model)} --outfile {name}.gguf",
        f"llama-server -m {name}.gguf",
    ]


def _remark_on_code(base: BaseRecord) -> list[str]:
    if not base.trust_remote_code:
        return []
    return [f"# {base.name} needs Python code of its own repository: read it, then add --trust-remote-code."]


def _odd_tensors(path: Path) -> list[str]:
    """The tensors that are no A or B of a linear layer: heads, biases, embeddings, DoRA's norms, other methods'."""
    try:
        with safe_open(path, "numpy") as file:
            names = list(file.keys())
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from None
    check_names(names, path)
    odd = sorted(name for name in names if not _PLAIN.fullmatch(name))
    return [listed(odd, 2)] if odd else []


def _odd_settings(config: Config) -> Iterator[str]:
    if config.get("alpha_pattern"):
        yield "alphas that differ by layer"
    if config.get("fan_in_fan_out"):
        yield "transposed layers (Conv1D)"
    if config.get("init_lora_weights") in FROM_WEIGHT:
        yield f"a start of its own ({config['init_lora_weights']})"


def _odd_ranks(config: Config) -> list[str]:
    return ["ranks that differ by layer"] if config.get("rank_pattern") else []


def _odd_base(base: BaseRecord) -> list[str]:
    """Whether the base is one that only peftlight can load."""
    folder = Path(base.name or "").expanduser()
    if base.name and (is_hub_id(base.name) or (folder / MODEL_CONFIG).is_file()):
        return []
    return [f"its base, {base.name or 'which is not known'}"]


def _rank(config: Config) -> int:
    rank: Any = config.get("r")
    return rank if isinstance(rank, int) else 0


def _name_of(folder: Path) -> str:
    """A name for the served adapter: that of the run or the folder."""
    parts = [part for part in folder.resolve().parts if part != OF_RUN]
    return re.sub(r"[^\w.-]+", "-", parts[-1], flags=re.ASCII).strip("-.") or OF_RUN
