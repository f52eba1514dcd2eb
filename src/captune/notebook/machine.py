"""The machine that a notebook runs on: what it has, what is installed, where files are kept."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from captune import __version__
from captune.console import logger, say
from captune.device import best_device, choose_precision
from captune.errors import CaptuneError
from captune.notebook.display import inside_ipython, plainly, show_table

GIB = 1024**3
# What a hosted notebook brings along, built for its drivers: an install must not exchange it.
KEPT_PACKAGES = ("torch", "torchvision", "torchaudio", "numpy")
DRIVE = Path("/content/drive")


@dataclass(frozen=True)
class Machine:
    """What :func:`setup` found.

    Attributes:
        place: ``Google Colab``, ``Kaggle`` or ``this machine``.
        device: ``cuda``, ``mps`` or ``cpu``.
        versions: of the packages that must stay, those that are installed.
        changed: package to ``(version before the install, version now)``; ``None`` where
            no versions were recorded.
    """

    place: str
    device: str
    memory_gib: float
    free_disk_gib: float
    versions: dict[str, str]
    changed: dict[str, tuple[str, str]] | None


@plainly
def setup(kept: str | Path = "versions-before.txt") -> Machine:
    """Show the machine, and whether the install left torch, torchvision and numpy alone.

    Args:
        kept: a file of lines ``package==version``, written before captune was installed and
            given to pip as its constraints. Where it is absent, nothing was installed.

    Raises:
        CaptuneError: the file has other lines.
    """
    if inside_ipython():
        _say_on_stdout()
    device = best_device()
    versions = {name: v for name in KEPT_PACKAGES if (v := _version(name))}
    machine = Machine(
        place="Google Colab" if on_colab() else "Kaggle" if on_kaggle() else "this machine",
        device=device.type,
        memory_gib=psutil.virtual_memory().total / GIB,
        free_disk_gib=shutil.disk_usage(Path.cwd()).free / GIB,
        versions=versions,
        changed=_changes(Path(kept), versions),
    )
    cores = f"{os.cpu_count()} CPU cores, {machine.memory_gib:.0f} GiB memory"
    rows = [
        ("place", f"{machine.place}: {cores}, {machine.free_disk_gib:.0f} GiB of disk free"),
        ("computes on", f"{_device_name(device)}, {choose_precision('auto', device)}"),
        ("captune", f"{__version__}, Python {platform.python_version()}"),
        *((name, versions.get(name, "not installed (not needed)")) for name in KEPT_PACKAGES[:2]),
        ("numpy", versions.get("numpy", "not installed")),
    ]
    show_table("Machine", ("", ""), rows, _verdict(machine.changed))
    if device.type == "cpu" and machine.place != "this machine":
        say("no GPU: choose one in the notebook's settings (Colab: Runtime, Change runtime type)")
    return machine


def _changes(path: Path, versions: dict[str, str]) -> dict[str, tuple[str, str]] | None:
    """What differs from the record; ``None`` without one."""
    if not path.is_file():
        return None
    changed = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        name, equals, before = line.strip().partition("==")
        if not line.strip():
            continue
        if not equals or not before:
            raise CaptuneError(
                f"{path} has the line {line!r}; package==version is wanted: delete the file"
            )
        if (now := versions.get(name, "not installed")) != before:
            changed[name] = (before, now)
    return changed


def _verdict(changed: dict[str, tuple[str, str]] | None) -> str:
    if changed is None:
        return "captune was here already: nothing was installed."
    if not changed:
        return "✓ torch, torchvision and numpy are the versions that were here before the install."
    list_of = ", ".join(f"{name} {was} → {now}" for name, (was, now) in changed.items())
    return (
        f"✗ The install changed {list_of}. Start from a fresh session and run the first cell "
        "before any other install."
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device_name(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    memory = torch.cuda.get_device_properties(device).total_memory / GIB
    return f"{torch.cuda.get_device_name(device)} with {memory:.0f} GiB"


def _say_on_stdout() -> None:
    """Notebooks paint stderr like an error; captune's words to the user are none."""
    logger.handlers[:] = [logging.StreamHandler(sys.stdout)]


def on_colab() -> bool:
    """Whether this is Google Colab."""
    return "COLAB_RELEASE_TAG" in os.environ or "google.colab" in sys.modules


def on_kaggle() -> bool:
    """Whether this is a Kaggle notebook."""
    return "KAGGLE_KERNEL_RUN_TYPE" in os.environ


@plainly
def storage(google_drive: bool = False) -> Path:
    """The folder that holds ``runs/``, made where it is not there.

    A Colab session is lost after some hours and its disk with it. On Drive the runs stay, with
    their resume states, and the same notebook goes on in a new session. Pictures are no good on
    Drive (many small files are slow there): :func:`~captune.notebook.prepare_data`
    keeps them on the local disk.

    Args:
        google_drive: on Colab, mount Drive (Google asks for leave) and take a folder there.

    Raises:
        CaptuneError: Drive cannot be mounted.
    """
    folder = Path()
    if google_drive and on_colab():
        folder = _mounted_drive() / "captune"
    elif google_drive:
        say("Google Drive is offered on Colab only: files stay on this machine")
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free / GIB
    say(f"runs are kept in {(folder / 'runs').resolve()} ({free:.0f} GiB free)")
    return folder


def _mounted_drive() -> Path:
    from google.colab import drive

    drive.mount(str(DRIVE))
    mine = DRIVE / "MyDrive"
    if not mine.is_dir():
        raise CaptuneError(f"Google Drive is not at {mine}: run the cell again and allow access")
    return mine
