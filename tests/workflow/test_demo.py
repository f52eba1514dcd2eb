"""The demo's configuration: `best` for a short training, and any other recipe as it is."""

from __future__ import annotations

import pytest

from captune.config import Config
from captune.errors import CaptuneError
from captune.workflow.demo import DEMO_CONFIG, SHORT, SMALL, demo_config


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
