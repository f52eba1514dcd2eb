"""A stumbling web server, stopped after each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from download.web import Server, serve


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server, web = serve()
    yield server
    web.shutdown()
    web.server_close()
