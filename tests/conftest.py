"""What holds for every test: no network, a cache of its own, and the command line as a fresh process sees it."""

import os
from collections.abc import Iterator

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PEFTLIGHT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def torch_optimizers_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """HF PEFT, the oracle, imports bitsandbytes; its AdamW would make the short name ambiguous for the command line."""
    from jsonargparse import _typehints

    every = _typehints.get_all_subclass_paths

    def without_bitsandbytes(*args: object, **kwargs: object) -> list[str]:
        return [path for path in every(*args, **kwargs) if not path.startswith("bitsandbytes.")]  # type: ignore[arg-type]

    monkeypatch.setattr(_typehints, "get_all_subclass_paths", without_bitsandbytes)
