"""Kaggle's copy: laid out as COCO 2014, by links or shrunk, with the official captions."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest
from PIL import Image

from captune.cli.main import main
from captune.data.coco import CocoSource
from captune.download.kaggle import HANDLE, check_credentials, download_kaggle
from captune.errors import CaptuneError
from download.web import QUICK, SPLITS, Server, photo, photo_name, stock


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without credentials, and none in the environment."""
    for name in ("API_TOKEN", "USERNAME", "KEY", "CONFIG_DIR"):
        monkeypatch.delenv(f"KAGGLE_{name}", raising=False)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setattr(Path, "home", lambda: home)
    monkeypatch.delitem(sys.modules, "google.colab", raising=False)
    return home


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Kaggle's copy as it unpacks: photos deep inside, boxes in folders of the same names."""
    root = tmp_path / "kagglehub" / "coco2014"
    for split, count in SPLITS.items():
        labels, images = (root / kind / f"{split}2014" for kind in ("annots", "images"))
        labels.mkdir(parents=True)
        images.mkdir(parents=True)
        for number in range(1, count + 1):
            name = photo_name(split, number)
            (labels / name.replace(".jpg", ".txt")).write_text("0 0.5 0.5 1 1", encoding="utf-8")
            (images / name).write_bytes(photo(number))
    return tmp_path / "kagglehub"


@pytest.fixture
def hub(copy: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A kagglehub that gives the copy; the handles it was asked for."""
    asked: list[str] = []
    module = types.ModuleType("kagglehub")
    module.dataset_download = lambda handle: asked.append(handle) or str(copy)  # type: ignore
    monkeypatch.setitem(sys.modules, "kagglehub", module)
    monkeypatch.setenv("KAGGLE_API_TOKEN", "secret")
    return asked


def test_photos_are_linked_and_captions_are_official(
    server: Server, copy: Path, hub: list[str], tmp_path: Path
) -> None:
    stock(server)
    folder = tmp_path / "coco"
    words = ["data", "kaggle", str(folder), "--source", server.address]
    assert main(words) == 0
    assert hub == [HANDLE]
    assert (folder / "train2014").resolve() == copy / "coco2014" / "images" / "train2014"
    source = CocoSource(folder)
    assert len(source.table("train")) == 12 and len(source.table("val")) == 5
    assert not any("zips" in path for path, _ in server.asked)
    server.asked.clear()
    assert main(words) == 0
    assert (server.asked, hub) == ([], [HANDLE])


def test_shrunk_photos_are_copies(
    server: Server, copy: Path, hub: list[str], tmp_path: Path
) -> None:
    stock(server)
    folder = download_kaggle(tmp_path / "coco", shrink=48, source=server.address, patience=QUICK)
    assert not (folder / "val2014").is_symlink()
    with Image.open(folder / "val2014" / photo_name("val", 5)) as image:
        assert image.size == (64, 48)
    with Image.open(copy / "coco2014" / "images" / "val2014" / photo_name("val", 5)) as image:
        assert image.size == (120, 90)


@pytest.mark.parametrize("place", [HANDLE.split("/")[1], f"datasets/{HANDLE}"])
def test_on_kaggle_the_attached_copy_is_read_in_place(
    server: Server, copy: Path, tmp_path: Path, place: str
) -> None:
    """No credentials, no kagglehub."""
    stock(server)
    attached = tmp_path / "input"
    (attached / place).parent.mkdir(parents=True)
    copy.rename(attached / place)
    folder = download_kaggle(
        tmp_path / "coco", source=server.address, attached=attached, patience=QUICK
    )
    assert len(CocoSource(folder).table("val")) == 5
    assert attached in (folder / "val2014").resolve().parents


def test_a_copy_that_was_cleared_from_the_cache_is_fetched_again(
    server: Server, copy: Path, hub: list[str], tmp_path: Path
) -> None:
    stock(server)
    folder = download_kaggle(tmp_path / "coco", source=server.address, patience=QUICK)
    copy.rename(tmp_path / "elsewhere")
    sys.modules["kagglehub"].dataset_download = lambda handle: str(tmp_path / "elsewhere")
    download_kaggle(folder, source=server.address, patience=QUICK)
    assert len(CocoSource(folder).table("val")) == 5


def test_a_copy_without_photos_is_refused(hub: list[str], copy: Path, tmp_path: Path) -> None:
    (copy / "coco2014" / "images" / "train2014").rename(copy / "moved")
    with pytest.raises(CaptuneError, match=r"no folder train2014 with COCO_\*\.jpg"):
        download_kaggle(tmp_path / "coco", patience=QUICK)


def test_what_kagglehub_raises_is_one_line(hub: list[str], tmp_path: Path) -> None:
    def refuse(handle: str) -> str:
        raise RuntimeError("403 Client Error.\n\nYou don't have permission")

    sys.modules["kagglehub"].dataset_download = refuse  # type: ignore[attr-defined]
    with pytest.raises(CaptuneError, match=r"did not give jeffaudi/.*: 403 Client Error\. You"):
        download_kaggle(tmp_path / "coco", patience=QUICK)


def test_folders_of_coco_and_kaggle_are_not_mixed(
    server: Server, hub: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stock(server)
    folder = download_kaggle(tmp_path / "coco", source=server.address, patience=QUICK)
    assert main(["data", "coco", str(folder), "--source", server.address]) == 2
    assert "holds 'coco-2014-kaggle', asked for is 'coco-2014'" in capsys.readouterr().err


# -- credentials ------------------------------------------------------------------------------
def test_without_credentials_the_steps_are_said(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "kaggle", str(tmp_path / "coco")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    for word in ("no Kaggle credentials", str(home / ".kaggle"), "1. ", "4. ", "Create New Token"):
        assert word in line


def test_without_kagglehub_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KAGGLE_USERNAME", "me")
    monkeypatch.setenv("KAGGLE_KEY", "secret")
    monkeypatch.setitem(sys.modules, "kagglehub", None)
    assert main(["data", "kaggle", str(tmp_path / "coco")]) == 2
    assert 'pip install "captune[kaggle]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "holds no 'username' and 'key'"),
        ('{"username": "me"}', "holds no 'username' and 'key'"),
        ('{"username": "me", "key": 7}', "holds no 'username' and 'key'"),
        (b"\xff\xfe", "cannot be read as JSON"),
    ],
)
def test_credentials_that_are_damaged_are_named(
    home: Path, content: str | bytes, expected: str
) -> None:
    path = home / ".kaggle" / "kaggle.json"
    path.parent.mkdir()
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CaptuneError, match=expected) as caught:
        check_credentials()
    assert str(path) in str(caught.value) and "1. sign in" in str(caught.value)


def test_every_kind_of_credentials_is_found(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "kaggle.json").write_text(json.dumps({"username": "me", "key": "x"}), encoding="utf-8")
    with monkeypatch.context() as patch:
        patch.setenv("KAGGLE_CONFIG_DIR", str(own))
        check_credentials()
    with monkeypatch.context() as patch:
        patch.setenv("KAGGLE_API_TOKEN", "x")
        check_credentials()
    (home / ".kaggle").mkdir()
    (home / ".kaggle" / "access_token").write_text("x", encoding="utf-8")
    check_credentials()
