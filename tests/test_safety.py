"""What docs/safety.md promises: no code from files, no connection that was not asked for, nothing told to others."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bad_inputs.kit import fill
from bad_inputs.outcome import working_folder
from tasks.small import QUIET

SOURCE = Path(__file__).parents[1] / "src" / "peftlight"
RUNS_CODE = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.load", "pickle.loads", "pickle.Unpickler",
    "marshal.load", "marshal.loads", "shelve.open", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "joblib.load",
    "dill.load", "dill.loads", "cloudpickle.load", "runpy.run_path", "torch.jit.load", "torch.hub.load",
}  # fmt: skip
"""Calls that run what they read."""
FORBIDDEN_VALUES = {("trust_remote_code", True), ("shell", True), ("allow_pickle", True)}
ALLOWED = {
    ("testing/checks.py", "pickle.loads"): "a copy of an object that the check itself made a line before",
    ("testing/processes.py", "pickle.loads"): "what the check hands to the processes that it starts",
}
"""With the reason why each is no way in."""


def _calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            yield ast.unparse(node.func), node


def _dangers(text: str) -> Iterator[str]:
    for name, call in _calls(ast.parse(text)):
        given = {word.arg: word.value.value for word in call.keywords if isinstance(word.value, ast.Constant)}
        whole = "load" in name.rpartition(".")[2] and given.get("weights_only") is False
        if name in RUNS_CODE or whole or (name == "torch.load" and given.get("weights_only") is not True):
            yield name
        yield from (f"{name}({key}={value})" for key, value in given.items() if (key, value) in FORBIDDEN_VALUES)


def test_nothing_in_the_source_runs_what_it_reads() -> None:
    found = {
        (str(path.relative_to(SOURCE)), danger)
        for path in SOURCE.rglob("*.py")
        for danger in _dangers(path.read_text())
    }
    assert found == set(ALLOWED)


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "Task.load_from_checkpoint(path, weights_only=False)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "subprocess.run(text, shell=True)",
        "yaml.load(text, Loader)",
        "pickle.load(file)",
        "exec(text)",
    ],
)
def test_the_reading_of_the_source_sees(line: str) -> None:
    assert list(_dangers(line))


_GUARDED = """
import glob, sys

attempts = []

def guard(event, details):
    lookup = event == "socket.getaddrinfo" and str(details[0]) not in ("localhost", "127.0.0.1", "::1", "None", "")
    inet = event == "socket.connect" and isinstance(details[1], tuple)
    if lookup or (inet and not str(details[1][0]).startswith(("127.", "::1"))):
        attempts.append((event, details))
        raise RuntimeError("no connection is allowed")

sys.addaudithook(guard)
from peftlight.cli import main
for command in sys.argv[1:]:
    code = main([found for word in command.split() for found in glob.glob(word) or [word]])
    assert code == 0, (command, code)
assert not attempts, attempts
"""
_LOCAL = (
    "fit --config run.yaml --trainer.default_root_dir a",
    "validate --config run.yaml --ckpt_path trained/checkpoints/last.ckpt",
    "evaluate trained --limit 4",
    "predict trained reviews.csv --out said.jsonl",
    "merge trained merged",
    "fit --config write.yaml --trainer.default_root_dir b",
    "generate b/* --prompt Once --max_new_tokens 2",
)


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with working_folder(None, tmp_path_factory.mktemp("kit") / "kit") as folder:
        fill(folder)
    return folder


def _in_a_process(code: str, *words: str, folder: Path, **variables: str) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "DISABLE_"))}
    environment |= {"OMP_NUM_THREADS": "1", "PEFTLIGHT_CACHE": str(folder / "cache"), **variables}
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("offline", ["0", "1"])
def test_local_files_need_no_connection(offline: str, kit: Path) -> None:
    with working_folder(kit, kit.parent / f"offline-{offline}") as folder:
        _in_a_process(_GUARDED, *_LOCAL, folder=folder, HF_HUB_OFFLINE=offline)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_guard_sees_a_connection(kit: Path) -> None:
    with pytest.raises(AssertionError, match=r"huggingface\.co"):
        _in_a_process(_GUARDED.replace("assert code == 0, (command, code)", ""), "evaluate nobody/nothing", folder=kit)


_SAID = """
from peftlight.cli import main
main(["fit", "--config", "nowhere.yaml"])
import datasets.config
from huggingface_hub import constants
from huggingface_hub.utils import build_hf_headers
print(constants.HF_HUB_DISABLE_TELEMETRY, datasets.config.HF_UPDATE_DOWNLOAD_COUNTS, "torch" in str(build_hf_headers()))
"""


def test_libraries_report_nothing_unless_the_user_says_so(tmp_path: Path) -> None:
    assert _in_a_process(_SAID, folder=tmp_path).split() == ["True", "False", "False"]
    wanted = {"HF_HUB_DISABLE_TELEMETRY": "0", "HF_UPDATE_DOWNLOAD_COUNTS": "1"}
    assert _in_a_process(_SAID, folder=tmp_path, **wanted).split() == ["False", "True", "True"]


pytestmark = QUIET
