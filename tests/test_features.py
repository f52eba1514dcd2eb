"""The feature store: what the frozen backbone gives each photo, once, and only of this backbone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from captune import features as features_module
from captune import rowfile
from captune.data.dataset import COCOClipDataset
from captune.data.sources import open_source
from captune.data.table import CaptionTable
from captune.errors import CaptuneError
from captune.features import FeatureStore
from captune.models import CLIPModel
from conftest import write_scene, write_split


@pytest.fixture
def model(tiny_resnet: Path, tiny_sentence: Path) -> CLIPModel:
    torch.manual_seed(1)
    return CLIPModel(str(tiny_sentence), image_encoder=str(tiny_resnet), hidden_dim=24)


@pytest.fixture
def table(coco: Path) -> CaptionTable:
    return open_source(coco).table("train")


@pytest.fixture
def calls(model: CLIPModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images the backbone was given, call by call."""
    counted: list[int] = []
    real = model.pooled_features

    def pooled(pixels: Tensor) -> Tensor:
        counted.append(len(pixels))
        return real(pixels)

    monkeypatch.setattr(model, "pooled_features", pooled)
    return counted


def build(table: CaptionTable, model: CLIPModel, cache: Path, **options: Any) -> FeatureStore:
    options = {"precision": "fp32", "num_workers": 0, "progress": False, **options}
    return FeatureStore.build(table, model, cache=cache, **options)


@torch.no_grad()
def slow(table: CaptionTable, model: CLIPModel, *, mirrored: bool = False) -> Tensor:
    """One image at a time."""
    model.eval()
    dataset = COCOClipDataset(table=table, image_size=model.preprocess.image_size)
    rows = []
    for row in range(len(table)):
        pixels = dataset[row].pixels[None]
        rows.append(model.pooled_features(pixels.flip(-1) if mirrored else pixels)[0])
    return torch.stack(rows)


def lopsided(path: Path) -> None:
    """A picture that its mirror image is not."""
    pixels = np.random.default_rng(len(path.name)).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    pixels[:, :20] //= 4
    from PIL import Image

    Image.fromarray(pixels).save(path)


def test_equals_one_image_at_a_time_in_both_views(
    table: CaptionTable, model: CLIPModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features_module, "BATCH", 5)
    for row in range(0, len(table), 3):
        lopsided(table.path(row))
    store = build(table, model, tmp_path / "f", mirrored=True)
    rows = np.arange(len(table))
    plain, mirrored = slow(table, model), slow(table, model, mirrored=True)
    found = store.lookup(rows)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, plain, atol=2e-3, rtol=2e-3)  # float16 on disk
    flipped = store.lookup(rows, np.ones(len(rows), dtype=bool))
    torch.testing.assert_close(flipped, mirrored, atol=2e-3, rtol=2e-3)
    assert float((plain - mirrored).abs().max()) > 0.02  # else this would show nothing
    chosen = np.arange(len(rows)) % 2 == 0
    mixed = store.lookup(rows[::-1], chosen)
    expected = torch.where(torch.tensor(chosen)[:, None], flipped.flip(0), found.flip(0))
    assert torch.equal(mixed, expected)


def test_an_image_whose_captions_name_a_side_is_never_mirrored(
    tmp_path: Path, model: CLIPModel
) -> None:
    rows = ["image,caption"]
    for name, captions in {
        "a": ["a Left turn", "a road"],
        "b": ["what is leftover", "bright"],
        "c": ["a road", "on the right."],
    }.items():
        lopsided(tmp_path / f"{name}.png")
        rows += [f"{name}.png,{caption}" for caption in captions]
    (tmp_path / "t.csv").write_text("\n".join(rows), encoding="utf-8")
    table = open_source(tmp_path / "t.csv").table("train")
    kept = {Path(str(table.path(row))).stem: row for row in range(len(table))}
    store = build(table, model, tmp_path / "f", mirrored=True)
    everything = np.arange(len(table))
    plain = store.lookup(everything)
    flipped = store.lookup(everything, np.ones(len(table), dtype=bool))
    same = {name: torch.equal(plain[row], flipped[row]) for name, row in kept.items()}
    expected = {"a": True, "b": False, "c": True}
    assert same == {name: expected[name] for name in kept} and "b" in kept


def test_without_the_mirrored_view_nothing_is_mirrored(
    table: CaptionTable, model: CLIPModel, tmp_path: Path
) -> None:
    store = build(table, model, tmp_path)
    rows = np.arange(len(table))
    assert torch.equal(store.lookup(rows, np.ones(len(rows), dtype=bool)), store.lookup(rows))


def test_the_second_build_never_calls_the_backbone(
    table: CaptionTable, model: CLIPModel, tmp_path: Path, calls: list[int]
) -> None:
    first = build(table, model, tmp_path / "f")
    assert sum(calls) == len(table)
    again = build(table, model, tmp_path / "f")
    assert sum(calls) == len(table) and np.array_equal(first.plain, again.plain)
    build(table, model, tmp_path / "f", mirrored=True)  # takes over the plain view
    assert sum(calls) == 2 * len(table)
    build(table, model, tmp_path / "f", mirrored=True)
    assert sum(calls) == 2 * len(table)


@pytest.mark.parametrize("change", ["weights", "statistics", "precision", "photo", "size", "order"])
def test_any_change_builds_another_store(
    table: CaptionTable, model: CLIPModel, tmp_path: Path, calls: list[int], change: str
) -> None:
    build(table, model, tmp_path / "f")
    calls.clear()
    precision = "fp32"
    if change == "weights":
        with torch.no_grad():
            next(iter(model.image_encoder.parameters())).mul_(1.01)
    elif change == "statistics":
        next(b for n, b in model.image_encoder.named_buffers() if "running_mean" in n).add_(0.01)
    elif change == "precision":
        precision = "bf16"
    elif change == "photo":
        write_scene(Path(str(table.path(3))), "white", "black", size=44)
    elif change == "size":
        model.preprocess = replace(model.preprocess, image_size=24)
    else:
        table = table.take_images(list(range(len(table)))[::-1])
    build(table, model, tmp_path / "f", precision=precision)
    assert sum(calls) == len(table)


def test_the_head_is_no_part_of_the_fingerprint(
    table: CaptionTable, model: CLIPModel, tmp_path: Path, calls: list[int]
) -> None:
    build(table, model, tmp_path / "f")
    torch.nn.init.normal_(next(iter(model.head.parameters())))
    build(table, model, tmp_path / "f")
    assert sum(calls) == len(table)


@pytest.mark.parametrize("batches", [0, 1, 3])
@pytest.mark.parametrize("view", ["plain", "mirrored"])
def test_an_interrupted_build_goes_on_and_equals_an_undisturbed_one(
    table: CaptionTable,
    model: CLIPModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    calls: list[int],
    batches: int,
    view: str,
) -> None:
    monkeypatch.setattr(features_module, "BATCH", 5)
    monkeypatch.setattr(rowfile, "SECONDS_BETWEEN_MARKS", 0.0)
    table.path(7).write_bytes(b"broken")
    table.path(21).write_bytes(b"broken")
    if view == "mirrored":
        build(table, model, tmp_path / "f")
    counted, limit = model.pooled_features, len(calls) + batches

    def stops(pixels: Tensor) -> Tensor:
        if len(calls) == limit:
            raise KeyboardInterrupt
        return counted(pixels)

    with monkeypatch.context() as patch:
        patch.setattr(model, "pooled_features", stops)
        with pytest.raises(KeyboardInterrupt):
            build(table, model, tmp_path / "f", mirrored=True)
    before = len(calls)
    resumed = build(table, model, tmp_path / "f", mirrored=True)
    assert len(calls) - before == (5 if view == "mirrored" else 10) - batches
    whole = build(table, model, tmp_path / "whole", mirrored=True)
    names = [store.plain.filename for store in (resumed, whole)]  # type: ignore[attr-defined]
    for name in ("plain.npy", "mirrored.npy"):
        one, other = (Path(path).with_name(name).read_bytes() for path in names)
        assert one == other


def test_a_broken_photo_is_a_row_of_nan_said_once_and_left_out(
    table: CaptionTable, model: CLIPModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = build(table, model, tmp_path / "f").lookup(np.arange(len(table)))
    table.path(4).write_bytes(b"broken")
    table.path(9).unlink()
    capsys.readouterr()
    store = build(table, model, tmp_path / "f", mirrored=True)
    said = capsys.readouterr().err
    assert said.count("2 unreadable images left out") == 1
    assert all(said.count(f"{table.path(row)}: ") == 1 for row in (4, 9))
    assert np.flatnonzero(~store.readable).tolist() == [4, 9]
    assert np.isnan(store.plain[[4, 9]]).all() and np.isfinite(store.plain[store.readable]).all()
    assert store.mirrored is not None and np.isnan(store.mirrored[[4, 9]]).all()
    others = np.flatnonzero(store.readable)
    torch.testing.assert_close(store.lookup(others), whole[others], atol=1e-3, rtol=1e-3)
    build(table, model, tmp_path / "f", mirrored=True)
    assert "unreadable" not in capsys.readouterr().err


def test_no_photo_at_all_is_told(table: CaptionTable, model: CLIPModel, tmp_path: Path) -> None:
    for row in range(len(table)):
        table.path(row).write_bytes(b"")
    with pytest.raises(CaptuneError, match=r"no image of squares train.* could be read"):
        build(table, model, tmp_path / "f")


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(
    table: CaptionTable, model: CLIPModel, tmp_path: Path, training: bool
) -> None:
    model.train(training)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    random = torch.get_rng_state()
    build(table, model, tmp_path / "f", mirrored=True)
    assert model.training is training and model.image_encoder.training is training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)  # cold or warm, a run draws the same


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_features_that_float16_cannot_hold_are_refused(
    table: CaptionTable,
    model: CLIPModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    value: float,
) -> None:
    model.train()
    wrong = torch.full((len(table), model.feature_dim), 1.0)
    wrong[3, 5] = value
    monkeypatch.setattr(model, "pooled_features", lambda pixels: wrong)
    with pytest.raises(CaptuneError, match="not finite in float16") as caught:
        build(table, model, tmp_path / "f")
    assert model.backbone_name in str(caught.value)
    assert model.training
    monkeypatch.undo()
    assert np.isfinite(build(table, model, tmp_path / "f").plain).all()


def test_a_damaged_store_is_refused_then_built_anew(
    table: CaptionTable, model: CLIPModel, tmp_path: Path, calls: list[int]
) -> None:
    path = Path(build(table, model, tmp_path / "f").plain.filename)  # type: ignore[attr-defined]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CaptuneError, match="feature store"):
        build(table, model, tmp_path / "f")
    build(table, model, tmp_path / "f")
    assert sum(calls) == 2 * len(table)


def test_mean_and_deviation_are_those_of_the_readable(
    table: CaptionTable, model: CLIPModel, tmp_path: Path
) -> None:
    table.path(2).write_bytes(b"broken")
    store = build(table, model, tmp_path / "f")
    mean, deviation = store.mean_and_deviation()
    rows = np.asarray(store.plain, dtype=np.float64)[store.readable]
    assert mean.dtype == deviation.dtype == torch.float32
    assert mean.numpy() == pytest.approx(rows.mean(0), rel=1e-6)
    assert deviation.numpy() == pytest.approx(rows.std(0), rel=1e-5, abs=1e-7)


def test_mean_and_deviation_over_many_blocks() -> None:
    rows = np.random.default_rng(0).normal(3, 2, (9000, 7)).astype(np.float16)
    rows[5000] = np.nan
    mean, deviation = FeatureStore(rows, None, np.ones(9000, dtype=bool)).mean_and_deviation()
    kept = rows.astype(np.float64)[np.arange(9000) != 5000]
    assert mean.numpy() == pytest.approx(kept.mean(0), rel=1e-6)
    assert deviation.numpy() == pytest.approx(kept.std(0), rel=1e-6)


def test_processes_that_decode_change_nothing(
    tmp_path: Path, model: CLIPModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features_module, "BATCH", 4)
    write_split(tmp_path / "many", "train", 14)
    table = open_source(tmp_path / "many").table("train")
    table.path(5).write_bytes(b"broken")
    one = build(table, model, tmp_path / "one")
    two = build(table, model, tmp_path / "two", num_workers=2)
    assert np.array_equal(one.plain, two.plain, equal_nan=True)


def test_a_pooling_over_the_map_is_part_of_the_features_and_the_head_goes_on_from_them(
    tiny_resnet: Path, tiny_sentence: Path, table: CaptionTable, tmp_path: Path
) -> None:
    model = CLIPModel(
        str(tiny_sentence), image_encoder=str(tiny_resnet), use_attention_pooling=True
    ).eval()
    assert model.pooling is not None
    with torch.no_grad():
        for parameter in model.pooling.parameters():
            parameter.add_(torch.randn_like(parameter))
        found = build(table, model, tmp_path).all()
        torch.testing.assert_close(found, slow(table, model), atol=2e-3, rtol=2e-3)
        embedded = model.project_image(found)
    paths = [table.path(row) for row in range(len(table))]
    whole = model.encode_image(paths, precision="fp32")
    torch.testing.assert_close(embedded, whole, atol=1e-3, rtol=0)


def test_a_part_that_was_frozen_in_eval_mode_stays_so_and_gradients_stay(
    table: CaptionTable, model: CLIPModel, tmp_path: Path
) -> None:
    model.train()
    next(m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)).eval()
    modes = [part.training for part in model.modules()]
    grads = [torch.ones_like(p) for p in model.parameters()]
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        parameter.grad = grad
    build(table, model, tmp_path)
    assert [part.training for part in model.modules()] == modes
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        assert parameter.grad is grad and bool((grad == 1).all()) and parameter.requires_grad


def test_an_interrupted_build_names_the_broken_photos_that_it_met(
    table: CaptionTable,
    model: CLIPModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(features_module, "BATCH", 5)
    monkeypatch.setattr(rowfile, "SECONDS_BETWEEN_MARKS", 0.0)
    for row in (1, 22):
        table.path(row).unlink()
    seen: list[int] = []

    def interrupt(*_: object) -> None:
        seen.append(1)
        if len(seen) == 3:
            raise KeyboardInterrupt

    hook = model.image_encoder.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        build(table, model, tmp_path / "f")
    hook.remove()
    first = capsys.readouterr().err
    store = build(table, model, tmp_path / "f")
    second = capsys.readouterr().err
    assert np.flatnonzero(~store.readable).tolist() == [1, 22]
    assert str(table.path(1)) in first and str(table.path(1)) not in second
    assert str(table.path(22)) in second and str(table.path(22)) not in first


def test_an_empty_file_is_damage_and_the_other_view_stays(
    table: CaptionTable, model: CLIPModel, tmp_path: Path, calls: list[int]
) -> None:
    build(table, model, tmp_path / "f", mirrored=True)
    (path,) = (tmp_path / "f").glob("*/plain.npy")
    path.write_bytes(b"")
    with pytest.raises(CaptuneError, match="damaged"):
        build(table, model, tmp_path / "f", mirrored=True)
    calls.clear()
    build(table, model, tmp_path / "f", mirrored=True)
    assert sum(calls) == len(table)


def test_features_of_another_width_than_stated_are_refused(
    table: CaptionTable, model: CLIPModel, tmp_path: Path
) -> None:
    model.image_encoder.register_forward_hook(
        lambda _, __, seen: seen._replace(pooled=seen.pooled[:, :7])
    )
    with pytest.raises(CaptuneError, match=r"shape \(24, 7\), stated are 32"):
        build(table, model, tmp_path)
