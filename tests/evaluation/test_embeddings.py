"""Image embeddings: what is kept, when it is computed anew, and what is left out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from captune.data.sources import open_source
from captune.data.table import CaptionTable
from captune.errors import CaptuneError
from captune.evaluation.embeddings import ImageEmbeddings, embed_images
from captune.models import CLIPModel
from captune.preprocess import Preprocess
from conftest import write_scene


@pytest.fixture
def model(tiny_clip: Path) -> CLIPModel:
    return CLIPModel.zero_shot(str(tiny_clip))


@pytest.fixture
def table(coco: Path) -> CaptionTable:
    return open_source(coco).table("val")


def embed(model: CLIPModel, table: CaptionTable, cache: Path | None) -> ImageEmbeddings:
    """In fp32: bf16 where it is native would blur the comparisons."""
    return embed_images(model, table, cache=cache, precision="fp32")


def images_computed(model: CLIPModel, work: Callable[[], object]) -> int:
    """How many images pass the tower while ``work`` runs."""
    passed: list[int] = []
    hook = model.register_forward_hook(lambda _, given, __: passed.append(len(given[0])))
    try:
        work()
    finally:
        hook.remove()
    return sum(passed)


def test_each_row_holds_the_unit_vector_of_its_own_image(
    model: CLIPModel, table: CaptionTable
) -> None:
    found = embed(model, table, None)
    assert found.rows.tolist() == list(range(len(table)))
    assert found.vectors.dtype == torch.float32
    for row, vector in zip(found.rows, found.vectors, strict=True):
        alone = model.encode_image(table.path(int(row)), precision="fp32")[0]
        torch.testing.assert_close(vector, alone, atol=1e-5, rtol=0)
        assert float(vector.norm()) == pytest.approx(1, abs=1e-5)


def test_the_second_time_nothing_is_computed(
    model: CLIPModel, table: CaptionTable, tmp_path: Path
) -> None:
    first = embed(model, table, tmp_path / "kept")
    again: list[ImageEmbeddings] = []
    work = lambda: again.append(embed(model, table, tmp_path / "kept"))  # noqa: E731
    assert images_computed(model, work) == 0
    torch.testing.assert_close(again[0].vectors, first.vectors, atol=0, rtol=0)
    assert again[0].rows.tolist() == first.rows.tolist()


def test_without_a_cache_folder_everything_is_computed_each_time(
    model: CLIPModel, table: CaptionTable
) -> None:
    embed(model, table, None)
    assert images_computed(model, lambda: embed(model, table, None)) == len(table)


def nudge_a_weight(model: CLIPModel, table: CaptionTable) -> None:
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 0.5


def repaint_an_image(model: CLIPModel, table: CaptionTable) -> None:
    write_scene(table.path(3), "white", "black")


def normalise_otherwise(model: CLIPModel, table: CaptionTable) -> None:
    model.preprocess = Preprocess(model.preprocess.image_size, (0.1, 0.2, 0.3))


@pytest.mark.parametrize("change", [nudge_a_weight, repaint_an_image, normalise_otherwise])
def test_a_change_of_weights_files_or_preprocessing_computes_anew(
    change: Callable[[CLIPModel, CaptionTable], None],
    model: CLIPModel,
    table: CaptionTable,
    tmp_path: Path,
) -> None:
    embed(model, table, tmp_path / "kept")
    change(model, table)
    work = lambda: embed(model, table, tmp_path / "kept")  # noqa: E731
    assert images_computed(model, work) == len(table)


def test_a_repainted_image_gets_its_new_vector_and_the_others_keep_theirs(
    model: CLIPModel, table: CaptionTable, tmp_path: Path
) -> None:
    before = embed(model, table, tmp_path / "kept")
    repaint_an_image(model, table)
    after = embed(model, table, tmp_path / "kept")
    moved = (before.vectors - after.vectors).abs().amax(dim=1) > 1e-4
    assert moved.tolist() == [row == 3 for row in range(len(table))]


def test_an_image_that_changes_within_the_same_size_is_noticed(
    model: CLIPModel, table: CaptionTable, tmp_path: Path
) -> None:
    """Uncompressed pictures all have the same number of bytes."""
    Image.new("RGB", (40, 40), "red").save(table.path(3), format="BMP")
    size = table.path(3).stat().st_size
    before = embed(model, table, tmp_path / "kept")
    Image.new("RGB", (40, 40), "blue").save(table.path(3), format="BMP")
    assert table.path(3).stat().st_size == size
    after = embed(model, table, tmp_path / "kept")
    assert float((before.vectors[3] - after.vectors[3]).abs().max()) > 1e-4


def test_another_table_of_the_same_images_is_not_mixed_up(
    model: CLIPModel, table: CaptionTable, tmp_path: Path
) -> None:
    whole = embed(model, table, tmp_path / "kept")
    part = embed(model, table.take_images([5, 2]), tmp_path / "kept")
    torch.testing.assert_close(part.vectors, whole.vectors[[5, 2]], atol=1e-5, rtol=0)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def overwrite(path: Path) -> None:
    path.write_bytes(b"not what was written here")


def replace_by_other_tensors(path: Path) -> None:
    save_file({"something": torch.zeros(3)}, path)


@pytest.mark.parametrize("damage", [cut_short, empty, overwrite, replace_by_other_tensors])
def test_a_damaged_cache_file_is_ignored_and_made_anew(
    damage: Callable[[Path], None], model: CLIPModel, table: CaptionTable, tmp_path: Path
) -> None:
    first = embed(model, table, tmp_path / "kept")
    (path,) = (tmp_path / "kept").iterdir()
    damage(path)
    again = embed(model, table, tmp_path / "kept")
    torch.testing.assert_close(again.vectors, first.vectors, atol=0, rtol=0)
    work = lambda: embed(model, table, tmp_path / "kept")  # noqa: E731
    assert images_computed(model, work) == 0, "the file was not replaced by a whole one"


def test_an_unreadable_image_is_named_counted_and_left_out(
    model: CLIPModel, table: CaptionTable, capsys: pytest.CaptureFixture[str]
) -> None:
    table.path(2).write_bytes(b"no picture")
    found = embed(model, table, None)
    assert found.unreadable == 1
    assert found.rows.tolist() == [0, 1, 3, 4, 5, 6, 7]
    assert len(found.vectors) == 7
    said = capsys.readouterr().err
    assert "1 unreadable images left out" in said and table.path(2).name in said


def test_the_count_of_unreadable_images_is_kept_with_the_vectors(
    model: CLIPModel, table: CaptionTable, tmp_path: Path
) -> None:
    table.path(2).write_bytes(b"no picture")
    embed(model, table, tmp_path / "kept")
    kept: list[ImageEmbeddings] = []
    work = lambda: kept.append(embed(model, table, tmp_path / "kept"))  # noqa: E731
    assert images_computed(model, work) == 0
    assert kept[0].unreadable == 1 and 2 not in kept[0].rows


def test_a_mended_image_is_taken_in_again(
    model: CLIPModel, table: CaptionTable, tmp_path: Path
) -> None:
    table.path(2).write_bytes(b"no picture")
    embed(model, table, tmp_path / "kept")
    write_scene(table.path(2), "red", "blue")
    assert embed(model, table, tmp_path / "kept").rows.tolist() == list(range(len(table)))


def test_a_table_without_one_readable_image_is_an_error(
    model: CLIPModel, table: CaptionTable
) -> None:
    for row in range(len(table)):
        table.path(row).write_bytes(b"no picture")
    with pytest.raises(CaptuneError, match=r"no image of squares val.* could be read"):
        embed(model, table, None)


def test_a_model_in_training_is_measured_as_it_is_used_and_left_as_it_was(
    tiny_resnet: Path, tiny_sentence: Path, table: CaptionTable
) -> None:
    """In training mode BatchNorm would see the batch, and move its running values."""
    model = CLIPModel(str(tiny_sentence), image_encoder=str(tiny_resnet), use_batch_norm=True)
    model.train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    vectors = embed(model, table, None).vectors
    assert model.training
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, state[key], atol=0, rtol=0)
    torch.testing.assert_close(vectors, embed(model.eval(), table, None).vectors, atol=0, rtol=0)
