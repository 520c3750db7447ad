"""How much memory of its own each process takes for a base that is sharded over them."""

import re
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from models import VOCABULARY
from peftlight.processes import FSDP2Strategy, sharded
from peftlight.strategies import LoRA
from peftlight.strategy import Adapter
from peftlight.tasks import CausalLM
from processes.worlds import SharedRows, spawn
from tasks.small import QUIET, quiet_trainer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="Linux tells which memory is a process's own"),
    *QUIET,
]
PROCESSES = 2


def own_memory() -> int:
    """The bytes that this process shares with no other and with no file."""
    found = re.search(r"^Private_Dirty: +(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) << 10


class Weighed(FSDP2Strategy):
    """Notes the most own memory that loading the base and sharding it took, unit after unit, and what is left of it."""

    def setup_environment(self) -> None:
        super().setup_environment()
        self.before, self.most = own_memory(), 0

    def _shard(self, adapter: Adapter) -> None:
        def noted(*arguments: Any, **options: Any) -> Any:
            made = fully_shard(*arguments, **options)
            self.most = max(self.most, own_memory() - self.before)
            return made

        fully_shard = sharded.fully_shard
        with patch.object(sharded, "fully_shard", noted):
            super()._shard(adapter)
        self.left = own_memory() - self.before


def train(rank: int, processes: int, base: Path, folder: Path) -> None:
    strategy = Weighed()
    trainer = quiet_trainer(folder, strategy=strategy, devices=processes, max_steps=1)
    trainer.fit(CausalLM(str(base), LoRA()), datamodule=SharedRows(words=True))
    (folder / f"{rank}.txt").write_text(f"{strategy.most} {strategy.left}")


def test_a_process_takes_memory_for_its_part_of_the_base_and_one_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = LlamaForCausalLM(LlamaConfig(hidden_size=512, intermediate_size=1536, num_hidden_layers=12,
                                         num_attention_heads=4, vocab_size=VOCABULARY))  # fmt: skip
    model.save_pretrained(tmp_path / "base")
    size = sum(parameter.nbytes for parameter in model.parameters())
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # else glibc keeps much of what is freed
    spawn(train, PROCESSES, tmp_path / "base", tmp_path, start="spawn")
    for rank in range(PROCESSES):
        most, left = map(int, (tmp_path / f"{rank}.txt").read_text().split())
        assert 0.45 * size < left <= most < 0.7 * size
