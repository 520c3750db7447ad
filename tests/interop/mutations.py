"""What can happen to an adapter's folder: each function does one thing to it, drawn from a seeded generator.

It returns whether the adapter must still load and compute the same.
"""

import json
import os
import pickle
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from peftlight.interop.tensor_files import PICKLE, TENSORS, sha256

CONFIG, ORIGIN = "adapter_config.json", "peftlight.json"
MARKER = "code_ran"
Random = random.Random
Mutation = Callable[[Path, Random], bool]

EVIL_PATTERNS = [
    "(a+)+$", "([a-z.]*)*[0-9]Z", "(.*.*)*x", "(.|.)*$x", "(e|e)*(r|r)*(t|t)*Z", "(?:.*){30}Z", ".*.*.*.*.*.*.*.*Z",
    "(x?){60}x{60}", "(.?.?.?.?.?.?)*Z", "(?i)(b+e*)+$", "a{99999999999}", "(" * 3000 + ")" * 3000, "[[a]", "(?P<x>a",
    "\\", "(?<=a+)b", "(b|be|ber|bert)+(\\.|\\w)+(\\w+\\.?)+Z", "(?=(.+)+Z)", "(.+)+(?!x)Z", "(?(1)a|b)", "*", "?",
]  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 4096, 10**9, -(10**9), 2**62, 2**64, 10**400, 0.0, -0.5, 1.0, 1.5, 1e30,
    1e308, 1e-300, float("nan"), float("inf"), float("-inf"), "", " ", "none", "all", "true", "8", "attention",
    "all-linear", "classifier", "query", "LORA", "ADALORA", "VERA", "IA3", "PREFIX_TUNING", "SEQ_CLS", "CAUSAL_LM",
    "é\u202e💥", "\u0000", "os.system", "../../etc/passwd", [], [[]], [None], [1], [-1, 0], ["query"], ["bert"], ["."],
    [""], ["query", 3], ["x"] * 1000, {}, {"query": 2}, {"": 1}, {"query": -1}, {"query": 10**9}, {"query": "x"},
    {"class_path": "os.system"}, {"class_path": "peftlight.strategies.lora.LoRA", "init_args": 3},
    {"class_path": "LoRA", "init_args": {"rank": 0}},
    {"class_path": "BottleneckAdapter", "init_args": {"width": 10**9}},
    *EVIL_PATTERNS, *([pattern] for pattern in EVIL_PATTERNS), *({pattern: 2} for pattern in EVIL_PATTERNS),
]  # fmt: skip
DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I32", "I8", "U8", "BOOL", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F4",
          "F6_E2M3", "C64", "U64", "X9", "", None, 3]  # fmt: skip
CASTS = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.bool, torch.uint8,
         torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64]  # fmt: skip


def edit_json(folder: Path, rng: Random) -> bool:
    """One field of the config, or of the record, gets another value, another name, or is lost."""
    path = folder / rng.choice([CONFIG, CONFIG, CONFIG, ORIGIN])
    if not path.is_file():
        return False
    content = json.loads(path.read_bytes())
    if rng.random() < 0.15:  # all its sizes are lies
        size = rng.choice([10**5, 10**7, 10**9, 10**15])
        path.write_text(re.sub(r'": [1-9]\d*(?=[,\n}])', f'": {size}', json.dumps(content)))
        return False
    place = rng.choice(list(_containers(content)))
    keys = list(place) if isinstance(place, dict) else list(range(len(place)))
    key, what = (
        (rng.choice(keys) if keys else "x"),
        rng.choice(["set", "set", "set", "drop", "rename", "add", "double"]),
    )
    if what == "add" and isinstance(place, dict):
        place[rng.choice(["future", "use_rslora", "r", "", "🦆", "target_parameters"])] = rng.choice(VALUES)
    elif keys and what == "drop":
        del place[key]
    elif keys and what == "rename" and isinstance(place, dict):
        place[rng.choice([key.upper(), f"{key}_", "é", ""])] = place.pop(key)
    elif keys and what == "double" and isinstance(place[key], int | float | str | list):
        place[key] = place[key] * 2
    elif keys:
        place[key] = rng.choice(VALUES)
    path.write_text(json.dumps(content))
    return False


def edit_text(folder: Path, rng: Random) -> bool:
    """The text of a JSON file is cut off, overwritten, or nested deeply."""
    path = folder / rng.choice([CONFIG, ORIGIN])
    if not path.is_file():
        return False
    content = bytearray(path.read_bytes()) or bytearray(b"{}")
    what, at = rng.choice(["cut", "flip", "insert", "nest", "odd"]), rng.randrange(len(content))
    if what == "cut":
        del content[at:]
    elif what == "flip":
        content[at] ^= 1 << rng.randrange(8)
    elif what == "insert":
        content[at:at] = rng.choice([b"\xff", b"\x00", b"}", b'"', b",", b"NaN", b"1e999", b"9" * 5000])
    elif what == "nest":
        deep = rng.choice([60, 900, 200_000])
        content = bytearray(b'{"r": ' + b"[" * deep + b"]" * deep + b"}")
    else:
        content = bytearray(
            rng.choice([b"", b"null", b"[]", b'"x"', b"\xef\xbb\xbf{}", b"{}", b"3", b"\x80\x04K\x01."])
        )
    path.write_bytes(bytes(content))
    return False


def reformat(folder: Path, rng: Random) -> bool:
    """Another program writes the same JSON in its own manner."""
    path = folder / rng.choice([CONFIG, ORIGIN])
    if path.is_file():
        items = list(json.loads(path.read_bytes()).items())
        rng.shuffle(items)
        path.write_text(json.dumps(dict(items), ensure_ascii=False, separators=(",", ":")))
    return True


def without_record(folder: Path, rng: Random) -> bool:
    """As if HF PEFT had written it."""
    (folder / ORIGIN).unlink(missing_ok=True)
    return True


def edit_bytes(folder: Path, rng: Random) -> bool:
    """The file of tensors is cut off, has bits flipped, or its header lies about its own length."""
    path = folder / TENSORS
    content = bytearray(path.read_bytes())
    header = int.from_bytes(content[:8], "little")
    what = rng.choice(["cut", "header", "header", "body", "length", "garbage", "longer"])
    if what == "cut":
        del content[rng.randrange(len(content)) :]
    elif what in ("header", "body"):
        start, end = (0, 8 + header) if what == "header" else (8 + header, len(content))
        for _ in range(rng.choice([1, 3])):
            content[rng.randrange(start, max(end, start + 1)) % len(content)] ^= 1 << rng.randrange(8)
    elif what == "length":
        content[:8] = rng.choice([0, 1, header - 1, header + 1, 2**31, 2**63, 2**64 - 1]).to_bytes(8, "little")
    elif what == "garbage":
        content = bytearray(rng.choice([b"", b"x", b"not a model" * 99, bytes(64), pickle.dumps({"a": 1})]))
    else:
        content += bytes(rng.choice([1, 100]))
    path.write_bytes(bytes(content))
    return False


def edit_header(folder: Path, rng: Random) -> bool:
    """A tensor's entry in the header lies: about its place, its shape, its numbers."""
    content = (folder / TENSORS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    key = rng.choice([name for name in header if name != "__metadata__"])
    entry, what = header[key], rng.choice(["dtype", "dtype", "shape", "offsets", "rename", "drop", "metadata"])
    if what == "dtype":
        entry["dtype"] = rng.choice(DTYPES)
    elif what == "shape":
        entry["shape"] = rng.choice(
            [[], [0], [-1], entry["shape"][::-1], [2**62, 4], [10**9], [*entry["shape"], 1], "x"]
        )
    elif what == "offsets":
        entry["data_offsets"] = rng.choice([[0, 0], [0, 4], [-4, 4], [4, 0], [0, 10**12], [2**64, 2**64], [0], "x"])
    elif what == "rename":
        header[rng.choice(["", "é", key.upper(), "__metadata__", key + ".x"])] = header.pop(key)
    elif what == "drop":
        del header[key]
    else:
        header["__metadata__"] = rng.choice([{"format": "tf"}, {}, {"a": 1}, None, []])
    text = json.dumps(header).encode()
    (folder / TENSORS).write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    return False


def edit_tensors(folder: Path, rng: Random) -> bool:
    """A whole file whose tensors are others: in name, shape, numbers."""
    tensors = load_file(folder / TENSORS)
    for _ in range(rng.choice([1, 1, 2])):
        key = rng.choice(list(tensors))
        value, what = tensors[key], rng.choice(["rename", "shape", "cast", "cast", "values", "drop", "add", "empty"])
        if what == "rename":
            tensors[rng.choice([key + "x", key.replace("0", "1"), key.replace("0", "7"), "x", "é.deltas.ü"])] = (
                tensors.pop(key)
            )
        elif what == "shape":
            tensors[key] = rng.choice([value.flatten(), value[None], value.repeat(2, *[1] * (value.dim() - 1)),
                                       value.T.contiguous() if value.dim() == 2 else value])  # fmt: skip
        elif what == "cast":
            tensors[key] = value.float().nan_to_num(0, 0, 0).clamp(-9, 9).to(rng.choice(CASTS))
        elif what == "values":
            odd = rng.choice([float("nan"), float("inf"), -float("inf"), 3e38, 1e-45])
            tensors[key] = torch.full_like(value.float(), odd)
        elif what == "drop" and len(tensors) > 1:
            del tensors[key]
        elif what == "add":
            tensors[rng.choice(["x", "classifier.weight", "base_model.model.bert.pooler.dense.weight"])] = value.clone()
        elif what == "empty":
            tensors[key] = value[:0] if value.dim() else value.new_zeros(0)
    save_file(tensors, folder / TENSORS)
    return False


def as_double(folder: Path, rng: Random) -> bool:
    """Another precision, which loses nothing."""
    double = {k: v.double() if v.is_floating_point() else v for k, v in load_file(folder / TENSORS).items()}
    save_file(double, folder / TENSORS)
    return True


def edit_files(folder: Path, rng: Random) -> bool:
    """A file is lost, or something else has its name."""
    path = folder / rng.choice([CONFIG, TENSORS, ORIGIN])
    if not path.is_file():
        return False
    what = rng.choice(["lost", "folder", "dangling", "circle", "swap", "index"])
    if what == "index":
        (folder / f"{TENSORS}.index.json").write_text('{"weight_map": {}}')
    if what == "swap":
        other = folder / rng.choice([CONFIG, TENSORS])
        if other.is_file() and other != path:
            shutil.copy(other, path)
        return False
    path.unlink()
    if what == "folder":
        path.mkdir()
    elif what in ("dangling", "circle"):
        path.symlink_to(folder / ("nowhere" if what == "dangling" else path.name))
    return path.name == ORIGIN and what in ("lost", "dangling", "index")


def linked(folder: Path, rng: Random) -> bool:
    """As in the hub's cache, where each file is a link to a blob."""
    path = folder / rng.choice([CONFIG, TENSORS])
    blob = folder.with_name(f"{folder.name}-blob")
    path.rename(blob)
    path.symlink_to(blob)
    return True


def pickled(folder: Path, rng: Random) -> bool:
    """A pickle in place of the safetensors: of tensors, or of code that leaves a file behind."""
    try:
        tensors = load_file(folder / TENSORS)
    except SafetensorError:
        return False
    (folder / TENSORS).unlink()
    what = rng.choice(["tensors", "code", "tensor of code", "bare code", "cut", "list", "flip"])
    if what == "bare code":
        (folder / PICKLE).write_bytes(pickle.dumps(Payload(folder)))
        return False
    key = next(iter(tensors))
    payload = Payload(folder)
    others: dict[str, Any] = {"code": payload, "tensor of code": {**tensors, key: payload}, "list": [1]}
    torch.save(others.get(what, tensors), folder / PICKLE)
    data = bytearray((folder / PICKLE).read_bytes())
    if what == "cut":
        del data[rng.randrange(len(data)) :]
    elif what == "flip":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    (folder / PICKLE).write_bytes(bytes(data))
    if what == "tensors":
        (folder / ORIGIN).unlink(missing_ok=True)
    return what == "tensors"


class Payload:
    """Unpickled with trust, it makes a file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder / MARKER),)


def _containers(value: Any) -> Iterator[Any]:
    """The value and all that is in it, as far as it holds others."""
    if isinstance(value, dict | list):
        yield value
        for item in value.values() if isinstance(value, dict) else value:
            yield from _containers(item)


def signed_again(folder: Path) -> None:
    """The record has the checksum of the tensors that are there now."""
    record = json.loads((folder / ORIGIN).read_bytes())
    record["sha256"] = sha256(folder / TENSORS)
    (folder / ORIGIN).write_text(json.dumps(record))


OF_TENSORS: list[Mutation] = [edit_bytes, edit_header, edit_tensors, edit_tensors, as_double]
OF_THE_REST: list[Mutation] = [reformat, *[edit_json] * 4, edit_text]
LAST: list[Mutation] = [edit_files, linked, pickled, without_record]


def mutate(folder: Path, rng: Random) -> tuple[bool, bool]:
    """One to three things happen. Returns: must it load as before; are the tensors those that were saved."""
    count = rng.choice([1, 1, 2, 3])
    chosen = [rng.choice([rng.choice(OF_TENSORS), rng.choice(OF_THE_REST), rng.choice(LAST)]) for _ in range(count)]
    first = [mutation for mutation in chosen if mutation in OF_TENSORS][:1]
    last = [mutation for mutation in chosen if mutation in LAST][:1]
    harmless = in_turn(first, folder, rng)
    if first and rng.random() < 0.9:
        signed_again(folder)
    elif first:
        harmless = False
    rest = sorted((mutation for mutation in chosen if mutation in OF_THE_REST), key=OF_THE_REST.index)
    harmless &= in_turn(rest, folder, rng)
    harmless &= in_turn(last, folder, rng)
    return harmless, not first


def in_turn(mutations: list[Mutation], folder: Path, rng: Random) -> bool:
    """All of them, and whether all were harmless."""
    harmless = [mutation(folder, rng) for mutation in mutations]
    return all(harmless)
