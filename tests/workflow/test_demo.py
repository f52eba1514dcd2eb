"""The demo's configuration: `best` for a short training, and any other recipe as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from captune.config import Config
from captune.errors import CaptuneError
from captune.workflow import demo as demo_module
from captune.workflow.demo import DEMO_CONFIG, SHORT, SMALL, demo, demo_config


def test_the_demo_shows_the_default_recipe() -> None:
    assert DEMO_CONFIG.recipe == Config().recipe == "best"
    assert all(DEMO_CONFIG[key] == value for key, value in {**SMALL, **SHORT}.items())


def test_plain_stays_plain() -> None:
    plain = demo_config(recipe="plain")
    assert set(plain.differences()) == set(SMALL) - {"towers"}


@pytest.mark.parametrize("recipe", ["best", "best-adapter", "plain"])
def test_what_the_user_sets_wins(recipe: str) -> None:
    config = demo_config(recipe=recipe, num_epochs=7, dropout=0.4)
    assert (config.recipe, config.num_epochs, config.dropout) == (recipe, 7, 0.4)


def test_an_unknown_key_is_named() -> None:
    with pytest.raises(CaptuneError, match="unknown config key 'num_epoch'"):
        demo_config(num_epoch=1)


def test_the_first_line_names_the_recipe_before_a_scene_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise CaptuneError("drawing starts here")

    monkeypatch.setattr(demo_module, "draw_demo", stop)
    with pytest.raises(CaptuneError, match="drawing starts here"):
        demo(tmp_path / "demo", overrides={"recipe": "plain", "num_epochs": 2})
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("recipe plain · towers minilm-lite0 · ") and "num_epochs=2" in first
    assert second.startswith("drawing 2,000 scenes")
