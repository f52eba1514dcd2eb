"""Pictures for pages and figures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from captune.evaluation.retrieval import Hit
from conftest import write_scene

MakeHits = Callable[..., list[Hit]]


@pytest.fixture
def hits(tmp_path: Path) -> MakeHits:
    """``hits(3)``: pictures with falling scores; ``caption=`` is what all of them say."""

    def make(count: int, caption: str = "a square") -> list[Hit]:
        found = []
        for place in range(count):
            path = tmp_path / "pictures" / f"{place}.jpg"
            if not path.exists():
                write_scene(path, "black", ("red", "green", "blue")[place % 3])
            found.append(Hit(str(path), 0.9 - 0.1 * place, caption))
        return found

    return make
