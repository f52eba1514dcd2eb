"""A pack is its source: same splits, ids, captions and digests; stopped anywhere, it goes on."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from captune.cli.main import main
from captune.data import shards
from captune.data.coco import KARPATHY
from captune.data.dataset import COCOClipDataset, DrawKey, SkippingDataset
from captune.data.labelled import open_labelled, training_part
from captune.data.objects import instance_files
from captune.data.packed import MANIFEST, Manifest, PackedSource, check_pack
from captune.data.photos import open_photo
from captune.data.pixels import UnreadableImageError, load_image
from captune.data.shards import photo_bytes
from captune.data.sources import Source, open_source
from captune.data.table import CaptionTable
from captune.data.tabular import TableOptions
from captune.download import pack as pack_module
from captune.download import pack_plan
from captune.download.pack import pack
from captune.errors import CaptuneError
from conftest import write_scene


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five photos a shard, in batches of two: 24 and 8 scenes make 5 and 2 shards."""
    monkeypatch.setattr(pack_plan, "SHARD_ROWS", 5)
    for module in (pack_module, shards):
        monkeypatch.setattr(module, "BATCH", 2)


@pytest.fixture
def packed(coco: Path, tmp_path: Path, small_shards: None) -> Path:
    pack(coco, tmp_path / "pack")
    return tmp_path / "pack"


def photo(path: Path, width: int, height: int, **save: object) -> None:
    """Noise, so that any change of a pixel shows."""
    pixels = np.random.default_rng([width, height]).integers(0, 256, (height, width, 3))
    Image.fromarray(pixels.astype(np.uint8)).save(path, **save)


def expect_same(mine: CaptionTable, original: CaptionTable) -> None:
    assert mine.digest == original.digest
    assert (mine.name, mine.split) == (original.name, original.split)
    assert mine.images.drop(["path"]).equals(original.images.drop(["path"]))
    assert mine.captions.equals(original.captions)
    assert mine.file_keys() == original.file_keys()


def expect_same_source(mine: Source, original: Source, splits: list[str]) -> None:
    assert mine.splits == splits
    for split in splits:
        expect_same(mine.table(split), original.table(split))
    for usual in ("train_split", "val_split", "evaluation_split"):
        assert getattr(mine, usual) == getattr(original, usual)


# -- what is in it ----------------------------------------------------------------------------
def test_splits_ids_captions_and_digests_are_those_of_the_source(coco: Path, packed: Path) -> None:
    found = open_source(packed)
    assert isinstance(found, PackedSource)
    expect_same_source(found, open_source(coco), ["train", "val"])
    names = [path.name for path in sorted(packed.glob("train-0*.arrow"))]
    assert names == [f"train-0000{number}.arrow" for number in range(5)]


def test_small_jpegs_keep_their_bytes_and_train_alike(coco: Path, packed: Path) -> None:
    mine, original = (open_source(path).table("train") for path in (packed, coco))
    for row in range(len(original)):
        assert photo_bytes(mine.path(row)) == original.path(row).read_bytes()
    draws = [COCOClipDataset(table=t, image_size=32, augment=True) for t in (mine, original)]
    for first, second in zip(*draws, strict=True):
        assert np.array_equal(first.pixels, second.pixels)
        assert first[1:] == second[1:]


@pytest.mark.parametrize(
    ("size", "packed_size"),
    [
        ((640, 480), (171, 128)),
        ((200, 130), (197, 128)),
        ((1300, 1200), (139, 128)),
        ((3000, 129), (2977, 128)),
    ],
)
def test_large_photos_are_resized_by_the_documented_rule(
    tmp_path: Path, size: tuple[int, int], packed_size: tuple[int, int]
) -> None:
    photo(tmp_path / "a.jpg", *size, quality=95)
    table = tmp_path / "shop.csv"
    table.write_text("image,caption,split\na.jpg,noise,train\n", encoding="utf-8")
    pack(table, tmp_path / "pack", side=128, quality=80, splits=["train"])
    path = open_source(tmp_path / "pack").table("train").path(0)
    expected = open_photo(tmp_path / "a.jpg", least_side=128)  # at a fraction, twice 128 or more
    expected = expected.resize(packed_size, Image.Resampling.BICUBIC)
    out = io.BytesIO()
    expected.save(out, "JPEG", quality=80)
    assert photo_bytes(path) == out.getvalue()
    assert load_image(path).size == packed_size


def test_small_photos_of_other_formats_become_jpegs_of_their_size(tmp_path: Path) -> None:
    photo(tmp_path / "a.png", 60, 50)
    Image.new("RGBA", (20, 30), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned
    photo(tmp_path / "turned.jpg", 40, 20, exif=exif)
    names = ("a.png", "clear.png", "turned.jpg")
    rows = "".join(f"{name},{name}\n" for name in names)
    (tmp_path / "t.csv").write_text("image,caption\n" + rows, encoding="utf-8")
    options = TableOptions(val=str(tmp_path / "t.csv"))
    pack(tmp_path / "t.csv", tmp_path / "pack", options=options)
    table = open_source(tmp_path / "pack").table("train")
    pictures = [load_image(table.path(row)) for row in range(3)]
    assert [picture.size for picture in pictures] == [(60, 50), (20, 30), (20, 40)]
    assert pictures[1].getpixel((5, 5)) == (255, 255, 255)
    assert photo_bytes(table.path(2)) == (tmp_path / "turned.jpg").read_bytes()


def test_own_tables_keep_their_splits(tmp_path: Path, small_shards: None) -> None:
    """Hashed splits, several rows an image, empty captions; `all` needs no photo of its own."""
    rows = ["image,caption"]
    for number in range(30):
        write_scene(tmp_path / f"p/{number}.jpg", "red", "blue")
        rows += [f"p/{number}.jpg,scene {number}", f"p/{29 - number}.jpg,again", f"p/{number}.jpg,"]
    table = tmp_path / "shop.csv"
    table.write_text("\n".join(rows), encoding="utf-8")
    said = pack(table, tmp_path / "pack")
    expect_same_source(open_source(tmp_path / "pack"), open_source(table), ["train", "val", "all"])
    assert "30 photos" in said


def test_a_photo_of_two_splits_is_packed_once(tmp_path: Path) -> None:
    write_scene(tmp_path / "a.jpg", "red", "blue")
    write_scene(tmp_path / "b.jpg", "red", "white")
    table = tmp_path / "t.csv"
    rows = "image,caption,split\na.jpg,one,train\nb.jpg,two,val\na.jpg,three,val\n"
    table.write_text(rows, encoding="utf-8")
    assert "2 photos in 2 shards" in pack(table, tmp_path / "pack")
    found = open_source(tmp_path / "pack")
    expect_same_source(found, open_source(table), ["train", "val", "all"])
    assert found.table("val").path(1) == tmp_path / "pack" / "train-00000.arrow::0"


def test_karpathys_splits_of_a_whole_coco_are_there(whole_coco: Path, tmp_path: Path) -> None:
    """Nearly all of its photos are empty files: they have no bytes in the pack either."""
    for path in sorted((whole_coco / "val2014").iterdir())[:2]:
        write_scene(path, "red", "blue")
    pack(whole_coco, tmp_path / "pack")
    found, original = open_source(tmp_path / "pack"), open_source(whole_coco)
    expect_same_source(found, original, ["train", "val", *KARPATHY])
    assert found.val_split == "karpathy-val"


def test_instances_beside_the_photos_come_along(tmp_path: Path) -> None:
    from captune.data.demo import draw_demo

    draw_demo(tmp_path / "demo", train=40, val=10, test=12)
    pack(tmp_path / "demo", tmp_path / "pack")
    for split in ("train", "val", "test"):
        files = instance_files(open_source(tmp_path / "pack").table(split))
        assert files == [tmp_path / "pack" / "annotations" / f"instances_{split}2014.json"]
    mine, original = (open_labelled(tmp_path / name, "test") for name in ("pack", "demo"))
    assert np.array_equal(mine.target, original.target) and mine.keys == original.keys
    assert training_part(tmp_path / "pack", mine) is not None


def test_a_pack_of_a_table_of_labels_is_classified_by_them(tmp_path: Path) -> None:
    rows = ["image,caption,split"]
    for number in range(8):
        write_scene(tmp_path / f"{number}.jpg", "red", "blue")
        rows.append(f"{number}.jpg,{'cat' if number % 2 else 'dog'},{'val' if number > 3 else ''}")
    (tmp_path / "t.csv").write_text("\n".join(rows), encoding="utf-8")
    pack(tmp_path / "t.csv", tmp_path / "pack", splits=["val"])
    found = open_labelled(tmp_path / "pack")
    assert found.keys == ["cat", "dog"] and found.target.tolist() == [1, 0, 1, 0]


def test_a_pack_can_be_packed_again_smaller(tmp_path: Path) -> None:
    photo(tmp_path / "a.jpg", 300, 200)
    (tmp_path / "t.csv").write_text("image,caption,split\na.jpg,noise,train\n", encoding="utf-8")
    pack(tmp_path / "t.csv", tmp_path / "large", side=128, splits=["train"])
    pack(tmp_path / "large", tmp_path / "small", side=64)
    found = open_source(tmp_path / "small").table("train")
    expect_same(found, open_source(tmp_path / "t.csv").table("train"))
    assert load_image(found.path(0)).size == (96, 64)


# -- how it is read ---------------------------------------------------------------------------
def test_workers_read_any_row(coco: Path, packed: Path) -> None:
    tables = [open_source(path).table("train") for path in (packed, coco)]
    rows = np.random.default_rng(1).permutation(24).tolist()
    keys = [[DrawKey(row, 0, 0) for row in rows[start : start + 4]] for start in range(0, 24, 4)]
    found = []
    for table, workers in zip(tables, (2, 0), strict=True):
        dataset = SkippingDataset(COCOClipDataset(table=table, image_size=32, augment=True))
        if workers:
            _ = dataset[0]  # a shard that is open already when workers are forked
        loader = DataLoader(dataset, batch_sampler=keys, num_workers=workers, collate_fn=list)
        found.append([sample for batch in loader for sample in batch])
    assert [sample.image for sample in found[0]] == rows
    for mine, original in zip(*found, strict=True):
        assert np.array_equal(mine.pixels, original.pixels)
        assert mine.caption == original.caption


def test_a_shard_that_changed_changes_the_digest_of_the_files(packed: Path) -> None:
    table = open_source(packed).table("val")
    before = table.files_digest()
    shard = packed / "val-00001.arrow"
    shard.write_bytes(shard.read_bytes())
    assert open_source(packed).table("val").files_digest() != before
    assert open_source(packed).table("val").digest == table.digest


def test_unreadable_photos_are_named_and_left_out(
    coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], small_shards: None
) -> None:
    original = open_source(coco).table("train")
    original.path(7).write_bytes(b"no picture")
    original.path(9).write_bytes(original.path(9).read_bytes()[:300])
    said = pack(coco, tmp_path / "pack")
    names = [original.file_name(row) for row in (7, 9)]
    assert "30 photos in 7 shards" in said and "2 unreadable left out" in said
    told = capsys.readouterr().err
    assert "2 unreadable photos left out" in told and all(name in told for name in names)
    listed = Manifest.read(tmp_path / "pack").unreadable()
    assert [line.split(":")[0] for line in listed] == names
    table = open_source(tmp_path / "pack").table("train")
    expect_same(table, original)
    with pytest.raises(UnreadableImageError, match="when the shard was written"):
        load_image(table.path(7))
    assert load_image(table.path(8)).size == (40, 40)


# -- stopped ----------------------------------------------------------------------------------
@pytest.mark.parametrize("stop", range(7))
def test_stopped_in_any_shard_it_goes_on_with_the_whole_ones(
    coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_shards: None, stop: int
) -> None:
    """Killed without a chance to tidy: the half-written file stays until the next run."""
    folder, written = tmp_path / "pack", []
    whole = pack_module.write_shard

    def killed(path: Path, batches: object) -> None:
        if len(written) == stop:
            path.with_name(f".{path.name}.x1.tmp").write_bytes(b"half")
            raise KeyboardInterrupt
        written.append(path.name)
        whole(path, batches)

    monkeypatch.setattr(pack_module, "write_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        pack(coco, folder)
    with pytest.raises(CaptuneError, match="is not complete: the `captune data pack`"):
        open_source(folder)
    times = {name: (folder / name).stat().st_mtime_ns for name in written}
    stop = 99
    pack(coco, folder)
    assert len(written) == 7 == len(set(written))
    assert all((folder / name).stat().st_mtime_ns == time for name, time in times.items())
    assert not list(folder.glob("*.tmp")) and not list(folder.glob(".*.tmp"))
    check_pack(folder)
    expect_same_source(open_source(folder), open_source(coco), ["train", "val"])


def test_ctrl_c_in_the_middle_of_a_shard_leaves_nothing_half_written(
    coco: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    small_shards: None,
) -> None:
    folder, seen = tmp_path / "pack", []

    row_of = pack_module.packed_photo

    def stopping(path: Path, side: int, quality: int) -> object:
        seen.append(path)
        if len(seen) == 8:  # in the second batch of the second shard
            raise KeyboardInterrupt
        return row_of(path, side, quality)

    monkeypatch.setattr(pack_module, "packed_photo", stopping)
    words = ["data", "pack", str(coco), "--out", str(folder)]
    assert main(words) == 130
    assert "the same command goes on where it stopped" in capsys.readouterr().err
    assert [path.name for path in folder.glob("*.arrow")] == ["train-00000.arrow"]
    assert not list(folder.glob(".*.tmp"))
    monkeypatch.setattr(pack_module, "packed_photo", row_of)
    assert main(words) == 0
    check_pack(folder)
    assert all(
        load_image(path) for path in open_source(folder).table("train").images["path"].to_pylist()
    )


def test_the_same_call_on_a_whole_pack_writes_no_shard(
    coco: Path, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(pack_module, "write_shard")
    monkeypatch.chdir(coco.parent)
    assert "32 photos in 7 shards" in pack(coco.name, packed)  # from another folder, too


# -- damaged ----------------------------------------------------------------------------------
def test_a_flipped_bit_is_found_by_check_and_mended_by_the_same_call(
    coco: Path, packed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = packed / "train-00002.arrow"
    good = shard.read_bytes()
    shard.write_bytes(good[:1500] + bytes([good[1500] ^ 1]) + good[1501:])
    assert main(["data", "pack", str(packed), "--check"]) == 2
    said = capsys.readouterr().err
    assert "train-00002.arrow is damaged" in said and "makes this file anew" in said
    shard.unlink()
    with pytest.raises(CaptuneError, match=r"train-00002\.arrow is not there"):
        open_source(packed)
    pack(coco, packed)
    assert shard.read_bytes() == good
    assert main(["data", "pack", str(packed), "--check"]) == 0
    assert "every file is as it was written" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["val-00000.arrow", "train-images.arrow", "val-captions.arrow"])
def test_a_cut_file_is_named_when_the_pack_is_opened(coco: Path, packed: Path, name: str) -> None:
    path = packed / name
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CaptuneError, match=rf"{name} is damaged: delete"):
        open_source(packed)
    path.unlink()
    pack(coco, packed)
    expect_same_source(open_source(packed), open_source(coco), ["train", "val"])


def test_a_table_that_is_no_arrow_is_named(packed: Path) -> None:
    path = packed / "val-images.arrow"
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(CaptuneError, match=r"val-images\.arrow is damaged"):
        open_source(packed).table("val")


def test_a_pack_names_no_file_outside_of_itself(packed: Path, tmp_path: Path) -> None:
    """It may be somebody else's, and what it names ends up in reports."""
    path = packed / "val-images.arrow"
    with pa.OSFile(str(path), "rb") as source, pa.ipc.open_file(source) as reader:
        table = reader.read_all()
    place = table.schema.get_field_index("path")
    outside = pa.array(["../secret.png", *table["path"].to_pylist()[1:]])
    table = table.set_column(place, "path", outside)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    manifest = json.loads((packed / MANIFEST).read_text(encoding="utf-8"))
    manifest["tables"]["val"][0]["bytes"] = path.stat().st_size
    (packed / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(CaptuneError, match=r"val-images\.arrow is damaged"):
        open_source(packed).table("val")


def test_another_version_is_refused(coco: Path, packed: Path) -> None:
    path = packed / MANIFEST
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, "format_version": 99}), encoding="utf-8")
    for work in (open_source, check_pack, lambda folder: pack(coco, folder)):
        with pytest.raises(CaptuneError, match=r"pack\.json has format_version 99, .* reads 1"):
            work(packed)


@pytest.mark.parametrize(
    "spoiled",
    [
        {"shards": []},
        {"side": None, "x": 1},
        {"tables": {"train": [{"file": 1}]}},
        {"usual": None},
        {"usual": {"train": "train"}},
        {"annotations": [{"file": "../a", "rows": 0, "bytes": 0, "digest": "", "unreadable": []}]},
    ],
)
def test_a_damaged_manifest_is_named(packed: Path, spoiled: dict[str, object]) -> None:
    path = packed / MANIFEST
    content = json.loads(path.read_text(encoding="utf-8"))
    if "usual" in spoiled and spoiled["usual"] is None:
        del content["usual"], spoiled["usual"]
    path.write_text(json.dumps({**content, **spoiled}), encoding="utf-8")
    with pytest.raises(CaptuneError, match=r"pack\.json is damaged"):
        open_source(packed)


# -- refused ----------------------------------------------------------------------------------
def test_no_room_is_said_before_anything_is_written(
    coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CaptuneError, match=r"needs about .* its disk has 0\.0 MB free"):
        pack(coco, tmp_path / "pack")
    assert not list((tmp_path / "pack").glob("*.arrow"))


def test_the_room_for_packing_a_pack_again_counts_each_shard_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = ["image,caption,split"]
    for number in range(7):
        photo(tmp_path / f"{number}.jpg", 300, 200)
        rows.append(f"{number}.jpg,noise,train")
    (tmp_path / "t.csv").write_text("\n".join(rows), encoding="utf-8")
    pack(tmp_path / "t.csv", tmp_path / "large", splits=["train"])
    shard = (tmp_path / "large" / "train-00000.arrow").stat().st_size
    wanted: list[int] = []
    monkeypatch.setattr(pack_module, "check_room", lambda _, needed: wanted.append(needed))
    pack(tmp_path / "large", tmp_path / "fine", quality=95)
    assert wanted == [shard]


def test_changed_captions_are_other_data(coco: Path, packed: Path) -> None:
    path = coco / "annotations" / "captions_val2014.json"
    path.write_text(path.read_text(encoding="utf-8").replace("red", "pink"), encoding="utf-8")
    with pytest.raises(CaptuneError, match="captions or photos were changed or moved since"):
        pack(coco, packed)


def test_a_split_whose_name_is_no_file_name_is_refused(tmp_path: Path) -> None:
    write_scene(tmp_path / "a.jpg", "red", "blue")
    (tmp_path / "t.csv").write_text("image,caption,split\na.jpg,one,../x\n", encoding="utf-8")
    with pytest.raises(CaptuneError, match=r"split '\.\./x' cannot be packed"):
        pack(tmp_path / "t.csv", tmp_path / "pack", splits=["../x"])
