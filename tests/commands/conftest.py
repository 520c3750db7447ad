"""The stand-in for the hub, for tests of the commands that speak to it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import close_session, constants
from huggingface_hub.utils import _http, disable_progress_bars, enable_progress_bars

from commands.hub_server import WRITER, Hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The stand-in, with the client of this process turned to it."""
    server = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    of_file = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + of_file)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)  # between the client's attempts
    monkeypatch.setenv("HF_TOKEN", WRITER)
    disable_progress_bars()
    close_session()
    yield server
    close_session()
    enable_progress_bars()
    server.stop()
