"""The feature store: each photo once through the frozen backbone, resumable, never another's."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from captune import features as features_module
from captune import rowfile
from captune.data.pixels import load_image, resize_and_crop
from captune.data.sources import open_source
from captune.data.table import CaptionTable
from captune.errors import CaptuneError
from captune.features import FeatureStore
from captune.models import CLIPModel

SIDED = 3  # this image's captions say left


@pytest.fixture
def model(tiny_resnet: Path, tiny_sentence: Path) -> CLIPModel:
    """Its backbone's features differ between a photo and its mirror image."""
    torch.manual_seed(1)
    return CLIPModel(str(tiny_sentence), image_encoder=str(tiny_resnet), hidden_dim=24).eval()


@pytest.fixture
def table(coco: Path) -> CaptionTable:
    """24 scenes, each made to differ from its mirror image; one has a caption with a side."""
    from PIL import Image

    table = open_source(coco).table("train")
    for row in range(len(table)):
        with Image.open(table.path(row)) as image:
            image.load()
        image.paste((255, 0, 255), (0, 0, 4 + row % 5, 40))
        image.save(table.path(row), quality=95)
    texts = table.texts()
    texts[int(table.captions_of(SIDED)[1])] = "the bar on the Left."
    captions = table.captions.set_column(1, "caption", pa.array(texts))
    return CaptionTable(table.images, captions, table.name, table.split)


def build(model: CLIPModel, table: CaptionTable, cache: Path, **options: object) -> FeatureStore:
    """In fp32 and without processes, unless told otherwise."""
    settings: dict[str, object] = {"precision": "fp32", "num_workers": 0, "progress": False}
    return FeatureStore.build(table, model, cache=cache, **{**settings, **options})  # type: ignore[arg-type]


def pixels_of(model: CLIPModel, table: CaptionTable, row: int) -> Tensor:
    size = model.preprocess.image_size
    return torch.from_numpy(resize_and_crop(load_image(table.path(row), least_side=size), size))


@torch.no_grad()
def one_by_one(model: CLIPModel, table: CaptionTable, *, mirrored: bool = False) -> Tensor:
    """The slow reference: one image, normalised by hand, through the backbone."""
    found = []
    for row in range(len(table)):
        pixels = pixels_of(model, table, row)
        pixels = torch.flip(pixels, (-1,)) if mirrored else pixels
        mean, std = (torch.tensor(v)[:, None, None] for v in ((0.5,) * 3, (0.25,) * 3))
        seen = model.image_encoder(((pixels / 255 - mean) / std)[None])
        found.append(seen.pooled if model.pooling is None else model.pooling(seen.map))
    return torch.cat(found)


def images_computed(model: CLIPModel, work: Callable[[], object]) -> int:
    """How many images pass the backbone while ``work`` runs."""
    passed: list[int] = []
    hook = model.image_encoder.register_forward_hook(lambda _, x, __: passed.append(len(x[0])))
    try:
        work()
    finally:
        hook.remove()
    return sum(passed)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=2e-3)  # float16 on disk


def test_equals_each_photo_alone(model: CLIPModel, table: CaptionTable, tmp_path: Path) -> None:
    store = build(model, table, tmp_path)
    expected = one_by_one(model, table)
    assert store.plain.dtype == np.float16 and isinstance(store.plain, np.memmap)
    assert store.all().dtype == torch.float32
    close(store.all(), expected)
    close(store.lookup(np.array([5, 5, 23])), expected[[5, 5, 23]])
    assert len(store) == 24 and store.readable.all()


def test_the_heads_input_is_what_the_store_holds(
    model: CLIPModel, table: CaptionTable, tmp_path: Path
) -> None:
    """Through the head, kept features give the model's own embeddings."""
    store = build(model, table, tmp_path)
    with torch.no_grad():
        embedded = model.project_image(store.all())
    whole = model.encode_image([table.path(row) for row in range(24)], precision="fp32")
    torch.testing.assert_close(embedded, whole, atol=1e-3, rtol=0)


def test_a_pooling_over_the_map_is_part_of_the_features(
    tiny_resnet: Path, tiny_sentence: Path, table: CaptionTable, tmp_path: Path
) -> None:
    model = CLIPModel(
        str(tiny_sentence), image_encoder=str(tiny_resnet), use_attention_pooling=True
    ).eval()
    with torch.no_grad():
        for parameter in model.pooling.parameters():  # type: ignore[union-attr]
            parameter.add_(torch.randn_like(parameter))
    close(build(model, table, tmp_path).all(), one_by_one(model, table))


def test_mirrored_features_are_those_of_mirrored_pixels(
    model: CLIPModel, table: CaptionTable, tmp_path: Path
) -> None:
    store = build(model, table, tmp_path, mirrored=True)
    plain, mirrored = one_by_one(model, table), one_by_one(model, table, mirrored=True)
    assert float((plain - mirrored).abs().max()) > 0.01  # the test can tell them apart
    rows = np.array([0, 1, 2, 0])
    asked = np.array([False, True, True, True])
    found = store.lookup(rows, asked)
    close(found, torch.stack([plain[0], mirrored[1], mirrored[2], mirrored[0]]))
    close(store.lookup(rows), plain[rows])
    close(store.all(), plain)


def test_an_image_with_a_caption_that_names_a_side_is_never_given_mirrored(
    model: CLIPModel, table: CaptionTable, tmp_path: Path
) -> None:
    store = build(model, table, tmp_path, mirrored=True)
    assert np.flatnonzero(~store.flippable).tolist() == [SIDED]
    rows = np.arange(24)
    found = store.lookup(rows, np.ones(24, dtype=bool))
    assert torch.equal(found[SIDED], store.all()[SIDED])
    assert not torch.equal(found[SIDED - 1], store.all()[SIDED - 1])


def test_a_store_without_mirrored_photos_says_so(
    model: CLIPModel, table: CaptionTable, tmp_path: Path
) -> None:
    store = build(model, table, tmp_path)
    rows = np.array([0, 1])
    assert torch.equal(store.lookup(rows, np.zeros(2, dtype=bool)), store.lookup(rows))
    with pytest.raises(CaptuneError, match="no mirrored photos"):
        store.lookup(rows, np.array([False, True]))


def test_what_is_on_disk_is_not_computed_again(
    model: CLIPModel, table: CaptionTable, tmp_path: Path
) -> None:
    assert images_computed(model, lambda: build(model, table, tmp_path)) == 24
    assert images_computed(model, lambda: build(model, table, tmp_path)) == 0
    # The mirrored photos alone are missing.
    assert images_computed(model, lambda: build(model, table, tmp_path, mirrored=True)) == 24
    assert images_computed(model, lambda: build(model, table, tmp_path, mirrored=True)) == 0
    assert images_computed(model, lambda: build(model, table, tmp_path)) == 0


def test_the_head_and_other_captions_change_nothing(
    model: CLIPModel, table: CaptionTable, tmp_path: Path
) -> None:
    build(model, table, tmp_path)
    with torch.no_grad():
        model.head.output.weight.add_(1)  # type: ignore[union-attr,operator]
    texts = pa.array([text + "!" for text in table.texts()])
    captions = table.captions.set_column(1, "caption", texts)
    other = CaptionTable(table.images, captions, table.name, table.split)
    assert images_computed(model, lambda: build(model, other, tmp_path)) == 0


@pytest.mark.parametrize("change", ["weights", "buffer", "precision", "preprocess", "file", "rows"])
def test_any_change_is_computed_anew(
    model: CLIPModel, table: CaptionTable, tmp_path: Path, change: str
) -> None:
    build(model, table, tmp_path)
    options = {"precision": "bf16"} if change == "precision" else {}
    encoder = model.image_encoder
    if change == "weights":
        with torch.no_grad():
            next(iter(encoder.parameters())).add_(1e-4)
    elif change == "buffer":
        next(b for name, b in encoder.named_buffers() if name.endswith("running_mean"))[0] += 1e-4
    elif change == "preprocess":
        model.preprocess = replace(model.preprocess, image_size=48)
    elif change == "file":
        os.utime(table.path(7), (1, 1))
    elif change == "rows":
        table = table.take_images(np.arange(24)[::-1])
    assert images_computed(model, lambda: build(model, table, tmp_path, **options)) == 24


def interrupt_after(model: CLIPModel, batches: int) -> Callable[[], None]:
    """Interrupt the backbone in the batch after so many; returns what lets it work again."""
    seen: list[int] = []

    def count(*_: object) -> None:
        if len(seen) == batches:
            raise KeyboardInterrupt
        seen.append(1)

    return model.image_encoder.register_forward_pre_hook(count).remove


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batches", [0, 2, 7])
def test_an_interrupted_build_goes_on(
    model: CLIPModel,
    table: CaptionTable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    batches: int,
    workers: int,
) -> None:
    """Five batches for each view: interrupted at the start, in the plain, in the mirrored one."""
    monkeypatch.setattr(features_module, "BATCH", 5)
    monkeypatch.setattr(rowfile, "SECONDS_BETWEEN_MARKS", 0.0)
    again = interrupt_after(model, batches)
    with pytest.raises(KeyboardInterrupt):
        build(model, table, tmp_path / "a", mirrored=True, num_workers=workers)
    again()
    kept = {0: 0, 2: 10, 7: 24 + 10}[batches]
    resumed = images_computed(
        model, lambda: build(model, table, tmp_path / "a", mirrored=True, num_workers=workers)
    )
    assert resumed == 48 - kept
    build(model, table, tmp_path / "b", mirrored=True)
    files = [sorted((tmp_path / side).glob("*/*.npy")) for side in "ab"]
    assert [path.name for path in files[0]] == ["mirrored.npy", "plain.npy"]
    for one, other in zip(*files, strict=True):
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY", None])
def test_a_damaged_view_is_refused_then_computed_anew(
    model: CLIPModel, table: CaptionTable, tmp_path: Path, damage: bytes | None
) -> None:
    build(model, table, tmp_path, mirrored=True)
    (path,) = tmp_path.glob("*/plain.npy")
    path.write_bytes(path.read_bytes()[:-20] if damage is None else damage)
    with pytest.raises(CaptuneError, match=r"feature store .* is damaged"):
        build(model, table, tmp_path, mirrored=True)
    # The other view was whole.
    assert images_computed(model, lambda: build(model, table, tmp_path, mirrored=True)) == 24


def test_broken_files_are_named_once_and_left_out(
    model: CLIPModel, table: CaptionTable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = one_by_one(model, table)
    table.path(4).write_bytes(b"no image")
    table.path(9).unlink()
    store = build(model, table, tmp_path, mirrored=True)
    said = capsys.readouterr().err
    assert "2 unreadable images left out" in said and len(said.splitlines()) == 1
    assert str(table.path(4)) in said and str(table.path(9)) in said
    assert np.flatnonzero(~store.readable).tolist() == [4, 9]
    for mirrored in (False, True):
        found = store.lookup(np.array([4, 5, 9]), np.full(3, mirrored))
        assert found.isnan().all(1).tolist() == [True, False, True]  # never replaced
    close(store.all()[store.readable], expected[store.readable])
    again = build(model, table, tmp_path)
    assert capsys.readouterr().err == "" and np.flatnonzero(~again.readable).tolist() == [4, 9]


def test_what_an_interrupted_build_found_broken_stays_so(
    model: CLIPModel,
    table: CaptionTable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(features_module, "BATCH", 5)
    monkeypatch.setattr(rowfile, "SECONDS_BETWEEN_MARKS", 0.0)
    table.path(1).unlink()
    table.path(22).unlink()
    again = interrupt_after(model, 3)
    with pytest.raises(KeyboardInterrupt):
        build(model, table, tmp_path)
    again()
    first = capsys.readouterr().err
    store = build(model, table, tmp_path)
    second = capsys.readouterr().err
    assert np.flatnonzero(~store.readable).tolist() == [1, 22]
    assert str(table.path(1)) in first and str(table.path(1)) not in second
    assert str(table.path(22)) in second and str(table.path(22)) not in first


def test_no_readable_photo_is_an_error(
    model: CLIPModel, table: CaptionTable, tmp_path: Path
) -> None:
    for row in range(24):
        table.path(row).write_bytes(b"")
    for _ in range(2):  # what lies on disk by then does not count as a store
        with pytest.raises(CaptuneError, match=r"no image of .* could be read"):
            build(model, table, tmp_path)


@pytest.mark.parametrize(
    ("factor", "words"),
    [(float("nan"), "NaN or infinite"), (float("inf"), "NaN or infinite"), (1e9, "ends at 65504")],
)
def test_what_float16_cannot_hold_is_refused(
    model: CLIPModel,
    table: CaptionTable,
    tmp_path: Path,
    factor: float,
    words: str,
    recwarn: pytest.WarningsRecorder,
) -> None:
    hook = model.image_encoder.register_forward_hook(
        lambda _, __, seen: seen._replace(pooled=seen.pooled * factor)
    )
    with pytest.raises(CaptuneError, match=words) as caught:
        build(model, table, tmp_path)
    assert model.backbone_name in str(caught.value)
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]
    hook.remove()
    close(build(model, table, tmp_path).all(), one_by_one(model, table))


def test_features_of_another_width_than_stated_are_refused(
    model: CLIPModel, table: CaptionTable, tmp_path: Path
) -> None:
    model.image_encoder.register_forward_hook(
        lambda _, __, seen: seen._replace(pooled=seen.pooled[:, :7])
    )
    with pytest.raises(CaptuneError, match=r"shape \(24, 7\), stated are 32"):
        build(model, table, tmp_path)


def test_mean_and_deviation_are_those_of_the_readable_photos(
    model: CLIPModel, table: CaptionTable, tmp_path: Path
) -> None:
    table.path(4).unlink()
    store = build(model, table, tmp_path, mirrored=True)
    rows = store.all()[torch.from_numpy(store.readable)].double()
    mean, deviation = store.mean_and_deviation()
    assert mean.dtype == deviation.dtype == torch.float32
    torch.testing.assert_close(mean, rows.mean(0).float())
    torch.testing.assert_close(deviation, rows.std(0, correction=0).float())


def test_the_model_is_left_as_it_was(model: CLIPModel, table: CaptionTable, tmp_path: Path) -> None:
    """BatchNorm computes in eval mode; a part that was frozen so stays frozen, the rest trains."""
    model.train()
    frozen = next(m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d))
    frozen.eval()
    modes = [part.training for part in model.modules()]
    grads = [torch.ones_like(p) for p in model.parameters()]
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        parameter.grad = grad
    state = {key: value.clone() for key, value in model.state_dict().items()}
    store = build(model, table, tmp_path)
    assert [part.training for part in model.modules()] == modes
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        assert parameter.grad is grad and bool((grad == 1).all()) and parameter.requires_grad
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    close(store.all(), one_by_one(model.eval(), table))


def test_later_draws_do_not_depend_on_what_was_on_disk(
    model: CLIPModel, table: CaptionTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features_module, "BATCH", 5)
    draws = []
    for _ in range(2):  # computed, then opened
        torch.manual_seed(3)
        build(model, table, tmp_path, num_workers=2)
        draws.append(torch.rand(4))
    assert torch.equal(*draws)


def test_processes_that_decode_change_nothing(
    model: CLIPModel, table: CaptionTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features_module, "BATCH", 5)
    alone = build(model, table, tmp_path / "alone")
    helped = build(model, table, tmp_path / "helped", num_workers=2)
    assert torch.equal(alone.all(), helped.all())
