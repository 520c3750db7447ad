"""`peftlight push` and the way back, with the hub's real client against a stand-in server."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from commands.hub_server import CUT, READER, WRITER, Handler, Hub
from models import inputs_for, make
from peftlight import adapter_folder, attach, load_adapter, save_adapter
from peftlight.cli import main
from peftlight.errors import UserError
from peftlight.opened import named_folders
from peftlight.strategies import LoRA

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # in the hub's client
BASE = "someone/tiny-llama"
FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors", "peftlight.json"]
REPO = "me/an-adapter"


def adapter(seed: int = 0) -> Any:
    made = attach(make("llama"), LoRA(rank=2))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters().values():
            parameter.normal_(std=0.3)
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run folder with an adapter and with what must stay on this machine."""
    run = tmp_path / "runs" / "my run"
    record = {
        "base": {"name": BASE, "revision": "v1", "auto_class": "AutoModelForCausalLM"},
        "data": {"source": str(tmp_path / "secret" / "rows.csv"), "fingerprint": "f" * 64},
        "task": "CausalLM",
    }
    save_adapter(adapter(), run / "adapter", record)
    (run / "adapter" / "notes.txt").write_text("mine")
    (run / "adapter" / "optimizer.pt").write_bytes(b"state")
    (run / "log.txt").write_text("log")
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "last.ckpt").write_bytes(b"checkpoint")
    return run


def push(*arguments: object) -> int:
    return main(["push", *map(str, arguments)])


def test_what_arrives_is_what_is_there(hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert push(folder, REPO) == 0
    repository = hub.repositories[REPO]
    arrived = repository.files()
    assert sorted(arrived) == [".gitattributes", *FILES]
    there = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    assert arrived["adapter_model.safetensors"] == there
    assert len(repository.commits) == 2  # the server's first, and ours
    assert not repository.private
    out = capsys.readouterr().out
    assert f"{hub.url}/{REPO}/commit/{repository.branches['main']}" in out
    assert f"vllm serve {BASE} --revision v1" in out


def test_an_untouched_file_goes_as_it_is_and_paths_of_this_machine_do_not(hub: Hub, folder: Path) -> None:
    assert push(folder, REPO) == 0
    arrived = hub.repositories[REPO].files()
    for name, content in arrived.items():
        assert str(folder.parents[1]).encode() not in content, name
    here = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert json.loads(arrived["adapter_config.json"]) == {**here, "base_model_name_or_path": BASE}
    record = json.loads((folder / "adapter" / "peftlight.json").read_text())
    assert json.loads(arrived["peftlight.json"]) == {**record, "data": {**record["data"], "source": "rows.csv"}}
    (folder / "adapter" / "adapter_config.json").write_bytes(arrived["adapter_config.json"])
    assert push(folder, "me/again") == 0
    assert hub.repositories["me/again"].files()["adapter_config.json"] == arrived["adapter_config.json"]


def test_what_was_pushed_is_fetched_by_name_and_computes_the_same(hub: Hub, folder: Path) -> None:
    assert push(folder, REPO) == 0
    hub.requests.clear()
    fetched = adapter_folder(REPO)
    asked = {path.rpartition("/")[2] for _, path in hub.requests}
    assert asked == {"adapter_config.json", "adapter_model.safetensors", "peftlight.json"}
    trained, inputs = adapter(), inputs_for("llama")
    torch.manual_seed(0)
    again = make("llama")
    load_adapter(again, fetched)
    with torch.no_grad():
        assert torch.equal(trained.model.eval()(**inputs).logits, again.eval()(**inputs).logits)
    assert named_folders([REPO, f"other={REPO}@main"]) == {"an-adapter": fetched, "other": fetched}


def test_all_files_are_of_one_commit_and_a_revision_is_honoured(hub: Hub, folder: Path) -> None:
    assert push(folder, REPO) == 0
    first = hub.repositories[REPO].branches["main"]
    save_adapter(adapter(seed=1), folder / "adapter", {"base": {"name": BASE}})
    assert push(folder, REPO) == 0
    now, then = adapter_folder(REPO), adapter_folder(f"{REPO}@{first}")
    assert adapter_folder(REPO, revision=first) == then != now
    assert load_file(now / FILES[2])[KEY].ne(load_file(then / FILES[2])[KEY]).any()


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def test_an_adapter_of_hf_peft_has_no_record(hub: Hub, folder: Path) -> None:
    files = {name: (folder / "adapter" / name).read_bytes() for name in FILES[1:3]}
    hub.add("them/lora", files)
    fetched = adapter_folder("them/lora")
    assert sorted(path.name for path in fetched.iterdir()) == sorted(files)


def test_private_branch_and_message(hub: Hub, folder: Path) -> None:
    assert push(folder, REPO, "--private", "true", "--revision", "second try", "--message", "better: 'now'") == 0
    repository = hub.repositories[REPO]
    assert repository.private
    assert repository.messages[-1] == "better: 'now'"
    assert "adapter_config.json" in repository.files("second%20try")
    assert "adapter_config.json" not in repository.files("main")


def test_a_second_push_of_the_same_changes_nothing(hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert push(folder, REPO) == 0
    assert push(folder, REPO) == 0
    assert len(hub.repositories[REPO].commits) == 2
    assert "nothing to change" in capsys.readouterr().out


def test_a_card_that_a_person_changed_is_kept_here_and_there(hub: Hub, folder: Path) -> None:
    card = folder / "adapter" / "README.md"
    card.write_text("---\nlicense: mit\n---\nmy words\n")
    assert push(folder, REPO) == 0
    assert hub.repositories[REPO].files()["README.md"] == card.read_bytes()
    card.unlink()
    save_adapter(adapter(seed=1), folder / "adapter", {"base": {"name": BASE}})
    assert push(folder, REPO) == 0
    assert b"my words" in hub.repositories[REPO].files()["README.md"]
    assert len(hub.repositories[REPO].commits) == 3


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    err = capsys.readouterr().err
    (message,) = [line for line in err.splitlines() if line.startswith("peftlight: error: ")]
    assert "Traceback" not in err
    assert WRITER not in err
    return err[err.index(message) :]


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (("POST", "/api/repos/create", 401), "The hub answered 401"),
        (("POST", "/api/repos/create", 403), "The token may not do this"),
        (("POST", "/api/repos/create", 409), "The hub answered 409"),
        (("POST", "/api/repos/create", 500), "trouble of its own"),
        (("POST", "/preupload/", 503), "The hub answered 503"),
        (("POST", "/objects/batch", 500), "The hub answered 500"),
        (("PUT", "/lfs/", 403), "The hub answered 403"),
        (("PUT", "/lfs/", 500), "The hub answered 500"),
        (("PUT", "/lfs/", CUT), "RemoteProtocolError"),
        (("POST", "/commit/", 409), "Somebody else changed the repository"),
        (("POST", "/commit/", 500), "The hub answered 500"),
        (("POST", "/commit/", CUT), "RemoteProtocolError"),
        (("GET", "/api/models/", 500), "The hub answered 500"),
        (("GET", "/api/models/", CUT), "RemoteProtocolError"),
    ],
    ids=lambda value: f"{value[0]} {value[1]} {value[2]}" if isinstance(value, tuple) else "",
)  # fmt: skip
def test_a_failure_of_the_hub_publishes_nothing(
    hub: Hub, folder: Path, fault: tuple[str, str, int], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.faults[fault[0], fault[1]] = fault[2]
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert push(folder, REPO) == 2
    message = error_of(capsys)
    assert said in message.replace("WriteError", "RemoteProtocolError").replace("ReadError", "RemoteProtocolError")
    assert f"Nothing was published at {REPO}" in message
    for repository in hub.repositories.values():
        assert list(repository.files()) == [".gitattributes"]
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_commit_in_between_is_not_overwritten(
    hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = hub.add(REPO, {})

    def somebody_else_is_faster(handler: Handler, oid: str, body: bytes) -> None:
        repository.commit("main", {"adapter_config.json": b"theirs"}, "theirs")
        take_blob(handler, oid, body)

    take_blob = Handler.take_blob
    monkeypatch.setattr(Handler, "take_blob", somebody_else_is_faster)
    assert push(folder, REPO) == 2
    assert "Somebody else changed the repository" in error_of(capsys)
    assert repository.files() == {"adapter_config.json": b"theirs"}


@pytest.mark.parametrize(
    ("token", "said"),
    [("hf_wrong", "The hub answered 401"), (READER, "The token may not do this"), ("", "needs a token to write")],
)
def test_tokens(
    hub: Hub, folder: Path, token: str, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    assert push(folder, REPO) == 2
    assert said in error_of(capsys)
    assert not hub.repositories


def test_no_hub_there(
    folder: Path, hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert push(folder, REPO) == 2
    assert "ConnectError" in error_of(capsys)
    with pytest.raises(UserError, match="no folder them/lora, and it cannot be fetched from the hub"):
        adapter_folder("them/lora")


@pytest.mark.parametrize("name", ["a/b/c", "me/an adapter", "me/a--x", "-me/x", "me/x.git", "alone", ""])
def test_names_that_the_hub_does_not_take(
    hub: Hub, folder: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert push(folder, name) == 2
    assert "peftlight: error: " in capsys.readouterr().err
    assert not hub.repositories


def test_a_repository_of_something_else_is_left_alone(
    hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add(REPO, {"config.json": b"{}", "model.safetensors": b"weights", "README.md": b"theirs"})
    assert push(folder, REPO) == 2
    assert "It holds something else: config.json, model.safetensors" in error_of(capsys)
    assert len(hub.repositories[REPO].commits) == 1


def test_private_is_not_asked_for_in_vain(hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.add(REPO, {}, private=False)
    assert push(folder, REPO, "--private", "true") == 2
    assert "is public" in error_of(capsys)
    assert len(hub.repositories[REPO].commits) == 1


def test_a_base_that_only_this_machine_has_is_not_published(
    hub: Hub, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    local = tmp_path / "models" / "mine"
    local.mkdir(parents=True)
    save_adapter(adapter(), folder / "adapter", {"base": {"name": str(local), "revision": "v1"}})
    assert push(folder, REPO) == 2
    assert "--base USER/MODEL" in error_of(capsys)
    assert push(folder, REPO, "--base", local) == 2
    assert not hub.repositories
    assert push(folder, REPO, "--base", "someone/else") == 0
    arrived = hub.repositories[REPO].files()
    assert json.loads(arrived["adapter_config.json"])["base_model_name_or_path"] == "someone/else"
    base = json.loads(arrived["peftlight.json"])["base"]
    assert (base["name"], base["revision"]) == ("someone/else", None)
    assert "base_model: someone/else" in arrived["README.md"].decode()
    assert not any(str(tmp_path).encode() in content for content in arrived.values())


def test_damaged_and_missing_adapters_are_not_published(
    hub: Hub, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = folder / "adapter" / "adapter_model.safetensors"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert push(folder, REPO) == 2
    assert "checksum" in error_of(capsys)
    assert push(tmp_path / "nothing", REPO) == 2
    assert not hub.requests


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    """As `peftlight merge` writes it, and what somebody put beside it."""
    model = tmp_path / "merged"
    make("llama").save_pretrained(model)
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in model.iterdir()}
    certificate = {
        "base": {"name": str(tmp_path / "models" / "mine"), "revision": None},
        "adapter": {"strategy": {"class_path": "peftlight.strategies.lora.LoRA", "init_args": {}}},
        "difference": {"largest": 1e-6, "mean": 1e-7, "agreement": 1.0, "places": 40},
        "dtype": "float32", "tolerance": 1e-5, "verdict": "within the tolerance", "files": hashes,
    }  # fmt: skip
    (model / "merge.json").write_text(json.dumps(certificate))
    (model / "pytorch_model.bin").write_bytes(b"pickle")
    (model / "events.log").write_text("log")
    return model


def test_a_merged_model_goes_up_with_its_certificate(
    hub: Hub, merged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert push(merged, "me/merged") == 0
    arrived = hub.repositories["me/merged"].files()
    files = {"config.json", "generation_config.json", "model.safetensors"}
    assert set(arrived) == {".gitattributes", "README.md", "merge.json", *files}
    for name in files:
        assert arrived[name] == (merged / name).read_bytes()
    here = json.loads((merged / "merge.json").read_text())
    assert json.loads(arrived["merge.json"]) == {**here, "base": {"name": "mine", "revision": None}}
    assert not any(str(tmp_path).encode() in content for content in arrived.values())
    assert f"vllm serve {merged}" in capsys.readouterr().out


def test_a_merged_model_that_was_touched_is_not_published(
    hub: Hub, merged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = merged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert push(merged, "me/merged") == 2
    assert "is not the file that was merged and compared" in error_of(capsys)
    (merged / "merge.json").write_text('{"files": {"config.json": "", "../x": ""}}')
    assert push(merged, "me/merged") == 2
    (merged / "merge.json").unlink()
    assert push(merged, "me/merged") == 2
    assert not hub.requests


def test_the_way_back_refuses_a_pickle_and_names_what_is_missing(hub: Hub) -> None:
    hub.add("them/pickle", {"adapter_config.json": b"{}", "adapter_model.bin": b"pickle"})
    with pytest.raises(UserError, match=r"adapter_model.safetensors"):
        adapter_folder("them/pickle")
    with pytest.raises(UserError, match="The hub answered 404"):
        adapter_folder("them/nothing")


def test_a_damaged_download_is_seen_when_it_is_loaded(hub: Hub, folder: Path, tmp_path: Path) -> None:
    save_file({KEY: torch.zeros(2, 32)}, tmp_path / "other.safetensors")
    files = {name: (folder / "adapter" / name).read_bytes() for name in FILES[1:]}
    hub.add("them/lora", {**files, FILES[2]: (tmp_path / "other.safetensors").read_bytes()})
    with pytest.raises(UserError, match="checksum"):
        load_adapter(make("llama"), adapter_folder("them/lora"))


def test_the_command_as_a_user_runs_it(hub: Hub, folder: Path, tmp_path: Path) -> None:
    """Everything through the environment, as the hub's client reads it."""
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": WRITER, "HF_HUB_DISABLE_XET": "1",
                   "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}  # fmt: skip
    command = [sys.executable, "-m", "peftlight", "push", str(folder), REPO]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    arrived = hub.repositories[REPO].files()
    there = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    assert hashlib.sha256(arrived["adapter_model.safetensors"]).digest() == hashlib.sha256(there).digest()
    assert WRITER not in done.stdout + done.stderr
