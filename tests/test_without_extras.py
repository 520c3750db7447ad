"""An install without extras: what it can do works, and what needs an extra names the line that brings it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bad_inputs.kit import fill
from bad_inputs.outcome import working_folder
from requirements import ROOT, extras, needed, plain
from tasks.small import QUIET

pytestmark = [*QUIET, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

_IN_ONE_PROCESS = """
import glob, sys
from peftlight.cli import main
for command in sys.argv[1:]:
    print("exit code", main([found for word in command.split() for found in glob.glob(word) or [word]]), flush=True)
"""


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with working_folder(None, tmp_path_factory.mktemp("kit") / "kit") as folder:
        fill(folder)
        (folder / "a.gguf").write_bytes(b"GGUF" + bytes(40))
    return folder


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages with those alone that a plain install brings."""
    folder = tmp_path_factory.mktemp("site")
    for package in needed(plain()).values():
        for top in {file.parts[0] for file in package.files or ()} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(Path(str(package.locate_file(top))))
    return folder


def _run(site: Path, folder: Path, *commands: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{site}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-S", "-W", "ignore", "-c", _IN_ONE_PROCESS, *commands]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)


def test_what_a_plain_install_can_do_works(site: Path, kit: Path) -> None:
    extra = {name for asked in extras().values() for name in needed(asked)} - needed(plain()).keys()
    assert {"gguf", "pillow", "matplotlib", "peft", "pytest"} <= extra
    assert not [name for name in ("gguf", "PIL", "matplotlib", "peft", "pytest") if (site / name).exists()]
    four_bits = f"--config {ROOT / 'configs' / '4bit.yaml'} --model.gradient_checkpointing false"
    with working_folder(kit, kit.parent / "works") as folder:
        done = _run(
            site,
            folder,
            "fit --config run.yaml --trainer.default_root_dir a",
            f"fit --config run.yaml {four_bits} --trainer.default_root_dir b",
            "evaluate a/* b/*",
            "predict b/* reviews.csv --out said.jsonl",
            "inspect a/*",
            "merge b/* merged",
            "fit --config write.yaml --trainer.default_root_dir c",
            "generate c/* --prompt Once --max_new_tokens 2",
        )
    assert done.stdout.count("exit code 0\n") == 8, done.stdout[-2000:] + done.stderr[-4000:]
    assert 'curves.png needs matplotlib: pip install "peftlight[plots]"' in done.stderr + done.stdout


def test_what_needs_an_extra_names_the_line_that_brings_it(site: Path, kit: Path) -> None:
    with working_folder(kit, kit.parent / "named") as folder:
        done = _run(
            site,
            folder,
            "fit --config run.yaml --model.base_model a.gguf",
            "fit --config see.yaml",
            "inspect trained --picture moved.png",
        )
    assert done.stdout.count("exit code 2\n") == 3, done.stdout[-2000:] + done.stderr[-4000:]
    assert [line for line in ("pip install gguf", "pip install pillow", 'pip install "peftlight[plots]"')
            if line not in done.stderr] == []  # fmt: skip
