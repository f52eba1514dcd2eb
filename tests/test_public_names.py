"""The names that notebooks import, as they write them."""

from __future__ import annotations

import inspect
import subprocess
import sys

import captune


def test_the_notebooks_line_works() -> None:
    from captune import (  # noqa: F401
        DEFAULT_CONFIG,
        CLIPModel,
        COCOClipDataset,
        InfoNCELoss,
        train_epoch,
        validate,
    )

    parameters = list(inspect.signature(train_epoch).parameters)
    assert parameters[:7] == [
        "model",
        "train_loader",
        "criterion",
        "optimizer",
        "scheduler",
        "epoch",
        "config",
    ]


def test_every_public_name_is_there_and_documented() -> None:
    for name in captune.__all__:
        value = getattr(captune, name)
        assert name == "__version__" or inspect.getdoc(value), name
    assert dir(captune) == captune.__all__


def test_unknown_names_are_attribute_errors() -> None:
    assert not hasattr(captune, "CLIPModell")


def test_importing_captune_loads_nothing_heavy() -> None:
    code = (
        "import captune, sys; print(sorted({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert found.strip() == "[]"
