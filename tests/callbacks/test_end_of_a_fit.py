"""A fit that is killed while it writes what it came to."""

from pathlib import Path

import pytest

import forked
from callbacks.commanded import command, recorded


@pytest.mark.slow
def test_whenever_the_end_is_killed_it_is_resumed_to_the_same_files(tmp_path: Path, encoder: Path) -> None:
    found = {}
    for flushes in (0, 3, 5, 8, 11, 14):
        folder = tmp_path / str(flushes)
        code, said = forked.peftlight(command(folder, encoder, "end", flushes, **{"trainer.max_epochs": 2}), folder)
        assert code == (-9 if flushes else 0), said
        if flushes:
            assert recorded(folder)["state"] == "running"
            code, said = forked.peftlight(["fit", "--resume", recorded(folder)["run"]], folder)
            assert code == 0, said
        run = recorded(folder)["run"]
        assert recorded(folder)["state"] == "finished"
        assert not list(run.rglob("*.tmp"))
        written = sorted(str(path.relative_to(run)) for path in run.rglob("*"))
        found[flushes] = written, (run / "adapter" / "adapter_model.safetensors").read_bytes()
    assert [flushes for flushes, one in found.items() if one != found[0]] == []
