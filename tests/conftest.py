"""What holds for every test: no network, a cache of its own, and the command line as a fresh process sees it."""

import atexit
import os
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

for _name in ("HF_TOKEN", "HF_HUB_CACHE", "HF_ENDPOINT", "COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR"):
    os.environ.pop(_name, None)
os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" not in os.environ:  # what the user has fetched is not there
    os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="no-models-")
    atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
os.umask(0o022)
for _number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):  # which a suite in the background ignores, with all that
    if signal.getsignal(_number) == signal.SIG_IGN:  # it starts
        signal.signal(_number, signal.default_int_handler if _number == signal.SIGINT else signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, then those with many, so that no long one is left for the end."""
    tests = Counter(item.path for item in items)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path not in slow, -tests[item.path]))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One for all workers: converting a GGUF file takes long."""
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PEFTLIGHT_CACHE", str(shared / "cache"))
        yield


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Processes of the next test would take it; Lightning's command line leaves its seed to those that it starts."""
    before = _told_to_processes()
    yield
    os.environ.pop("PL_GLOBAL_SEED", None)
    assert _told_to_processes() == before


def _told_to_processes() -> dict[str, str]:
    kinds = ("PEFTLIGHT_", "RANK", "LOCAL_", "WORLD_SIZE", "NODE_", "GROUP_", "MASTER_", "TORCHELASTIC_", "SLURM_")
    return {name: value for name, value in os.environ.items() if name.startswith(kinds)}


@pytest.fixture(scope="session", autouse=True)
def torch_optimizers_only() -> Iterator[None]:
    """HF PEFT, the oracle, imports bitsandbytes; its AdamW would make the short name ambiguous for the command line."""
    from jsonargparse import _typehints

    every = _typehints.get_all_subclass_paths

    def without_bitsandbytes(*args: object, **kwargs: object) -> list[str]:
        return [path for path in every(*args, **kwargs) if not path.startswith("bitsandbytes.")]  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_typehints, "get_all_subclass_paths", without_bitsandbytes)
        yield


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a BERT without a head."""
    import bases  # late: transformers reads the variable above at its import

    return bases.save_encoder(tmp_path_factory.mktemp("models") / "encoder")


@pytest.fixture(scope="session")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a ViT without a head, and its image processor."""
    import bases

    return bases.save_vision(tmp_path_factory.mktemp("models") / "vision")


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Llama."""
    import bases

    return bases.save_decoder(tmp_path_factory.mktemp("models") / "decoder")


@pytest.fixture(scope="session")
def encoder_decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a T5."""
    import bases

    return bases.save_encoder_decoder(tmp_path_factory.mktemp("models") / "encoder_decoder")
