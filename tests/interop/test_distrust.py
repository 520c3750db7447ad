"""A file cannot make us wait or allocate without end; patterns that people write are read all the same."""

import json
import re
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from interop.mutations import CONFIG, EVIL_PATTERNS, ORIGIN
from models import make
from peftlight import PEFTStrategy, attach, load_adapter, save_adapter
from peftlight.errors import UserError
from peftlight.interop.distrust import Room, check_patterns
from peftlight.strategies import BottleneckAdapter, HyperLoRA, LoRA, PrefixTuning, PTuning, VeRA

HARMLESS = [
    "query", "q_proj", "", "model.layers.0.self_attn.q_proj", ".*", r".*\.(q_proj|v_proj)", r".*attention\.self\.\w+",
    r"(.*\.)?layers\.(1[0-9]|2[0-7])\.mlp\.(up|gate|down)_proj", r"model\.layers\.\d+\.self_attn\.[qkvo]_proj",
    "^(?!.*vision).*(?:q_proj|k_proj|v_proj|o_proj).*$", r".*(language|text).*layers\.[0-9]+\..*_proj",
    # what a tool for vision models writes into its files
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:k_proj|v_proj|q_proj|"
    r"out_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\."
    r"(?:(?:k_proj|v_proj|q_proj|out_proj)))",
    "(?:" + "|".join(re.escape(f"model.layers.{n}.self_attn.q_proj") for n in range(400)) + ")",
]  # fmt: skip
PATHS = [f"base.model.language_model.layers.{number}.self_attn.q_proj" for number in range(300)]


@pytest.mark.parametrize("pattern", HARMLESS)
def test_patterns_that_people_write(pattern: str) -> None:
    check_patterns({"target_modules": pattern})
    if pattern.count("*") < 3:  # in a list each of them stands for the end of a path, behind one more repeat
        check_patterns({"modules_to_save": [pattern], "rank_pattern": {pattern: 4}})


@pytest.mark.parametrize(
    "pattern", ["(a+)+$", "([a-z.]*)*[0-9]Z", "(.|.)*Z", "(.*.*)*x", "(x?){60}x{60}", "(?=(.+)+Z)", ".*" * 5 + "Z",
                "(a|a)" * 40, "(?:a|ab)(?:c|bcd)" * 30, "(" * 60 + ")" * 60, "a{99999999999}"]
)  # fmt: skip
@pytest.mark.parametrize("config", [{"target_modules": "?"}, {"layers_pattern": ["?"]}, {"alpha_pattern": {"?": 1}}])
def test_patterns_without_end(config: dict[str, Any], pattern: str) -> None:
    with pytest.raises(UserError, match=r"pattern|regular expression|nests groups"):
        check_patterns(json.loads(json.dumps(config).replace('"?"', json.dumps(pattern))))


@pytest.mark.parametrize("pattern", [r"(.*)(.*)(.*)(.*)[^\w.]", r"(.?){18}[^\w.]", *HARMLESS, *EVIL_PATTERNS])
def test_what_is_let_through_takes_moments(pattern: str) -> None:
    """On sixty paths of a large model."""
    try:
        check_patterns({"target_modules": pattern})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            compiled = re.compile(pattern)
    except (UserError, re.error):
        return
    since = time.process_time()
    for path in PATHS[:60]:
        compiled.fullmatch(path)
    assert time.process_time() - since < 3


@pytest.mark.parametrize(
    ("strategy", "field"),
    [
        (BottleneckAdapter(width=8), "width"),
        (HyperLoRA(rank=4), "rank"),
        (PrefixTuning(3), "num_virtual_tokens"),
        (PTuning(3), "num_virtual_tokens"),
        (VeRA(rank=8), "rank"),
        (VeRA(rank=8, save_projection=False), "rank"),
        (LoRA(rank=4, use_dora=True), "rank"),
    ],
)
@pytest.mark.parametrize("size", [10**6, 10**9, 10**15])
def test_a_size_that_is_a_lie(strategy: PEFTStrategy, field: str, size: int, tmp_path: Path) -> None:
    save_adapter(attach(make("bert"), strategy), tmp_path)
    for file in (CONFIG, ORIGIN):
        text = (tmp_path / file).read_text()
        lie = re.sub(rf'"({field}|r)": \d+', rf'"\1": {size}', text)
        (tmp_path / file).write_text(lie)
    model, since = make("bert"), time.process_time()
    with pytest.raises(UserError):
        load_adapter(model, tmp_path)
    assert time.process_time() - since < 5
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_the_room_counts_what_is_made() -> None:
    with Room({}) as room:
        torch.empty(1 << 20)
        torch.zeros(3, 4) + torch.ones(3, 4)
    assert (1 << 27) - room.left == (1 << 20) + 24
    with Room({"a": torch.empty(100)}):
        torch.empty((1 << 27) + 800)
        with pytest.raises(UserError, match="asks for a tensor of 9 values"):
            torch.arange(9)


def test_many_tensors_together_are_too_many() -> None:
    with Room({}):
        for _ in range(128):
            torch.empty(1 << 20)
        with pytest.raises(UserError, match="far more than its file"):
            torch.zeros(2, 3)
