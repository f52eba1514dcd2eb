"""Wrong input: one line that names the culprit, and exit code 2."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from captune.cli.main import main
from conftest import write_scene, write_split


@dataclass(frozen=True)
class Desk:
    """What a case may spoil: everything in it is the test's own copy."""

    folder: Path
    coco: Path
    run: Path
    clip: Path
    tiny: list[str]

    def train(self, data: object, *words: str) -> list[str]:
        return ["train", str(data), "--out", str(self.folder / "out"), *self.tiny, *words]

    def table(self, name: str, content: str | bytes) -> Path:
        """A table beside two pictures, ``a.jpg`` and ``b.jpg``."""
        for picture in ("a.jpg", "b.jpg"):
            write_scene(self.folder / picture, "red", "white")
        path = self.folder / name
        path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        return path

    def annotations(self, split: str = "train") -> Path:
        return self.coco / "annotations" / f"captions_{split}2014.json"

    def edit(self, path: Path, **changes: Any) -> None:
        value = json.loads(path.read_text(encoding="utf-8"))
        kept = {key: new for key, new in {**value, **changes}.items() if new is not None}
        path.write_text(json.dumps(kept), encoding="utf-8")

    @property
    def picture(self) -> str:
        return str(next((self.coco / "val2014").iterdir()))


@pytest.fixture
def desk(coco: Path, run: Path, tiny_clip: Path, tiny: list[str], tmp_path: Path) -> Desk:
    return Desk(tmp_path, coco, run, tiny_clip, tiny)


# Each case spoils something and returns the command and the words that its error must hold.
Case = Callable[[Desk], tuple[list[str], list[str]]]


def a_protocol_that_is_not_there(desk: Desk) -> tuple[list[str], list[str]]:
    words = ["evaluate", str(desk.run), "--protocol", "coco1k"]
    return words, ["no protocol 'coco1k'", "coco-1k"]


def a_protocol_of_another_split(desk: Desk) -> tuple[list[str], list[str]]:
    words = ["evaluate", str(desk.run), "--protocol", "coco-1k", "--split", "val"]
    return words, ["karpathy-test", "squares val", "--protocol full"]


def a_protocol_whose_split_is_not_whole(desk: Desk) -> tuple[list[str], list[str]]:
    words = ["evaluate", str(desk.run), "--protocol", "coco-5k"]
    return words, ["karpathy-test needs all of COCO's val2014", "squares lacks 5,000 of 5,000"]


def plausible_matches_of_another_split(desk: Desk) -> tuple[list[str], list[str]]:
    words = ["evaluate", str(desk.run), "--eccv", "--split", "val"]
    return words, ["--eccv and --pmrp", "karpathy-test alone", "--split val"]


def plausible_matches_of_another_protocol(desk: Desk) -> tuple[list[str], list[str]]:
    words = ["evaluate", str(desk.run), "--eccv", "--protocol", "coco-1k"]
    return words, ["--eccv and --pmrp", "protocol coco-5k", "--protocol coco-1k"]


def plausible_matches_of_a_sample(desk: Desk) -> tuple[list[str], list[str]]:
    return ["evaluate", str(desk.run), "--eccv"], ["karpathy-test", "lacks 5,000 of 5,000"]


def pmrp_of_an_empty_folder(desk: Desk) -> tuple[list[str], list[str]]:
    words = ["evaluate", str(desk.run), "--pmrp", str(desk.folder)]
    return words, ["pm_image_to_caption.json", "pm_caption_to_image.json", "naver-ai"]


def hubness_of_another_protocol(desk: Desk) -> tuple[list[str], list[str]]:
    words = ["evaluate", str(desk.run), "--hubness", "--protocol", "one-caption"]
    return words, ["--hubness corrects the whole split", "--protocol one-caption"]


def against_nothing(desk: Desk) -> tuple[list[str], list[str]]:
    words = ["evaluate", str(desk.run), "--against", str(desk.folder / "runs" / "gone")]
    return words, ["no run at", "gone"]


def a_checkpoint_that_is_not_there(desk: Desk) -> tuple[list[str], list[str]]:
    words = ["classify", f"{desk.run}@epoch-7", desk.picture, "--labels", "a", "b"]
    return words, [str(desk.run), "no checkpoint 'epoch-7'", "stage-1, best", "keep_epochs"]


def a_misspelt_run(desk: Desk) -> tuple[list[str], list[str]]:
    return ["evaluate", f"{desk.run}s"], ["no run at", "did you mean 'run'?"]


def blend_of_other_towers(desk: Desk) -> tuple[list[str], list[str]]:
    words = ["blend", str(desk.clip), str(desk.run), "--out", str(desk.folder / "blend")]
    return words, [str(desk.clip), str(desk.run), "cannot be blended", "text tower"]


def blend_of_one_step(desk: Desk) -> tuple[list[str], list[str]]:
    return ["blend", str(desk.run), str(desk.run), "--steps", "1"], ["steps=1", "at least 2"]


def blend_into_a_run(desk: Desk) -> tuple[list[str], list[str]]:
    words = ["blend", f"{desk.run}@stage-1", str(desk.run), "--out", str(desk.run)]
    return words, [str(desk.run), "no blend", "--out", "run-2"]


def hubness_without_a_run(desk: Desk) -> tuple[list[str], list[str]]:
    return ["evaluate", str(desk.clip), str(desk.coco), "--hubness"], ["--hubness", "no run"]


def hubness_of_the_training_images(desk: Desk) -> tuple[list[str], list[str]]:
    words = ["evaluate", str(desk.run), "--split", "train", "--hubness"]
    return words, ["--hubness", "all images of squares train", "another split"]


# -- data in the COCO layout ------------------------------------------------------------------
def missing_folder(desk: Desk) -> tuple[list[str], list[str]]:
    return desk.train(desk.folder / "nowhere"), ["no data at", "nowhere"]


def folder_without_annotations(desk: Desk) -> tuple[list[str], list[str]]:
    shutil.rmtree(desk.coco / "annotations")
    return desk.train(desk.coco), ["squares", "annotations/captions_*2014.json"]


def no_annotation_file_for_the_split(desk: Desk) -> tuple[list[str], list[str]]:
    desk.annotations("val").unlink()
    return desk.train(desk.coco), ["no split 'val'", "captions_val2014.json"]


def json_without_images(desk: Desk) -> tuple[list[str], list[str]]:
    desk.edit(desk.annotations(), images=None)
    return desk.train(desk.coco), ["captions_train2014.json", "no list 'images'"]


def json_that_is_a_list(desk: Desk) -> tuple[list[str], list[str]]:
    desk.annotations().write_text("[1, 2]", encoding="utf-8")
    return desk.train(desk.coco), ["captions_train2014.json", "'images'"]


def broken_json(desk: Desk) -> tuple[list[str], list[str]]:
    whole = desk.annotations().read_text(encoding="utf-8")
    desk.annotations().write_text(whole[:500], encoding="utf-8")
    return desk.train(desk.coco), ["captions_train2014.json", "cannot be read as JSON"]


def caption_of_an_unknown_image(desk: Desk) -> tuple[list[str], list[str]]:
    stray = [{"id": 77, "image_id": 987654, "caption": "of nothing"}]
    desk.edit(desk.annotations(), annotations=stray)
    return desk.train(desk.coco), ["captions_train2014.json", "caption 77", "image 987654"]


def entry_without_file_name(desk: Desk) -> tuple[list[str], list[str]]:
    desk.edit(desk.annotations(), images=[{"id": 1}])
    return desk.train(desk.coco), ["captions_train2014.json", "'file_name'"]


def no_captions(desk: Desk) -> tuple[list[str], list[str]]:
    desk.edit(desk.annotations(), annotations=[])
    return desk.train(desk.coco), ["captions_train2014.json", "no captions"]


def every_image_missing(desk: Desk) -> tuple[list[str], list[str]]:
    shutil.rmtree(desk.coco / "train2014")
    return desk.train(desk.coco), ["none of the 24 images", "train2014", "scene_train_"]


def every_image_unreadable(desk: Desk) -> tuple[list[str], list[str]]:
    for path in (desk.coco / "val2014").iterdir():
        path.write_bytes(b"no picture")
    return ["evaluate", str(desk.clip), str(desk.coco)], ["squares val", "could be read"]


def unknown_split(desk: Desk) -> tuple[list[str], list[str]]:
    words = ["evaluate", str(desk.run), str(desk.coco), "--split", "vall"]
    return words, ["no split 'vall'", "did you mean 'val'?"]


def karpathy_test_of_a_sample(desk: Desk) -> tuple[list[str], list[str]]:
    words = ["evaluate", str(desk.run), str(desk.coco), "--split", "karpathy-test"]
    return words, ["karpathy-test", "lacks 5,000 of 5,000", "--split val"]


def column_options_for_a_folder(desk: Desk) -> tuple[list[str], list[str]]:
    return desk.train(desk.coco, "--image-column", "photo"), ["column options", "squares"]


# -- own tables -------------------------------------------------------------------------------
def csv_without_image_column(desk: Desk) -> tuple[list[str], list[str]]:
    path = desk.table("photos.csv", "photo,caption\na.jpg,one\n")
    return desk.train(path), ["photos.csv", "no image column", "photo, caption", "--image-column"]


def csv_without_caption_column(desk: Desk) -> tuple[list[str], list[str]]:
    path = desk.table("photos.csv", "image,words\na.jpg,one\n")
    return desk.train(path), ["photos.csv", "no caption column", "words", "--caption-column"]


def unknown_caption_column(desk: Desk) -> tuple[list[str], list[str]]:
    path = desk.table("photos.csv", "image,title\na.jpg,one\n")
    return desk.train(path, "--caption-column", "titel"), ["photos.csv", "'titel'", "image, title"]


def unknown_image_column(desk: Desk) -> tuple[list[str], list[str]]:
    path = desk.table("photos.csv", "image,title\na.jpg,one\n")
    return desk.train(path, "--image-column", "imgae"), ["photos.csv", "'imgae'", "image, title"]


def template_with_unknown_column(desk: Desk) -> tuple[list[str], list[str]]:
    path = desk.table("photos.csv", "image,title,colour\na.jpg,one,red\n")
    words = ["'color'", "did you mean 'colour'?", "photos.csv"]
    return desk.train(path, "--caption", "{title}, {color}"), words


def template_without_column(desk: Desk) -> tuple[list[str], list[str]]:
    path = desk.table("photos.csv", "image,title\na.jpg,one\n")
    return desk.train(path, "--caption", "a photo"), ["'a photo'", "names no column"]


def csv_of_another_encoding(desk: Desk) -> tuple[list[str], list[str]]:
    path = desk.table("photos.csv", "image,caption\na.jpg,un café\n".encode("latin-1"))
    return desk.train(path), ["photos.csv", "cannot be read as csv"]


def empty_csv(desk: Desk) -> tuple[list[str], list[str]]:
    return desk.train(desk.table("photos.csv", "")), ["photos.csv", "cannot be read as csv"]


def csv_of_a_header_alone(desk: Desk) -> tuple[list[str], list[str]]:
    path = desk.table("photos.csv", "image,caption\n")
    return desk.train(path), ["photos.csv", "no rows", "'image'"]


def csv_of_empty_captions(desk: Desk) -> tuple[list[str], list[str]]:
    path = desk.table("photos.csv", "image,caption,split\na.jpg,,train\nb.jpg, ,train\n")
    return desk.train(path), ["photos", "no captions", "2 images"]


def csv_with_ragged_rows(desk: Desk) -> tuple[list[str], list[str]]:
    path = desk.table("photos.csv", "image,caption\na.jpg,one, with a comma\n")
    return desk.train(path), ["photos.csv", "cannot be read as csv"]


def csv_whose_images_are_all_missing(desk: Desk) -> tuple[list[str], list[str]]:
    path = desk.table("photos.csv", "image,caption,split\nx.jpg,one,train\ny.jpg,two,train\n")
    return desk.train(path), ["none of the 2 images", "photos.csv", "x.jpg"]


def csv_without_validation_rows(desk: Desk) -> tuple[list[str], list[str]]:
    path = desk.table("photos.csv", "image,caption,split\na.jpg,one,train\nb.jpg,two,train\n")
    return desk.train(path), ["photos.csv", "'val'", "--val"]


def missing_validation_table(desk: Desk) -> tuple[list[str], list[str]]:
    path = desk.table("photos.csv", "image,caption\na.jpg,one\nb.jpg,two\n")
    return desk.train(path, "--val", str(desk.folder / "gone.csv")), ["gone.csv"]


def table_of_another_suffix(desk: Desk) -> tuple[list[str], list[str]]:
    return desk.train(desk.table("photos.xlsx", "PK")), ["photos.xlsx", ".csv", ".parquet"]


def broken_jsonl(desk: Desk) -> tuple[list[str], list[str]]:
    path = desk.table("photos.jsonl", '{"image": "a.jpg", "caption": ')
    return desk.train(path), ["photos.jsonl", "cannot be read as jsonl"]


def broken_parquet(desk: Desk) -> tuple[list[str], list[str]]:
    path = desk.table("photos.parquet", "PAR1 and no more")
    return desk.train(path), ["photos.parquet", "cannot be read as parquet"]


# -- runs -------------------------------------------------------------------------------------
def missing_run(desk: Desk) -> tuple[list[str], list[str]]:
    return ["evaluate", str(desk.folder / "runs" / "gone")], ["no run at", "gone"]


def folder_that_is_no_run(desk: Desk) -> tuple[list[str], list[str]]:
    return ["evaluate", str(desk.coco)], ["squares", "neither a run"]


def run_of_another_version(desk: Desk) -> tuple[list[str], list[str]]:
    desk.edit(desk.run / "config.json", format_version=99)
    return ["evaluate", str(desk.run)], ["config.json", "format_version 99", "reads 1"]


def weights_description_of_another_version(desk: Desk) -> tuple[list[str], list[str]]:
    desk.edit(desk.run / "image_encoder.json", format_version=99)
    return ["evaluate", str(desk.run)], ["image_encoder.json", "format_version 99", "reads 1"]


def run_of_another_version_as_out(desk: Desk) -> tuple[list[str], list[str]]:
    desk.edit(desk.run / "config.json", format_version=99)
    words = ["train", str(desk.coco), *desk.tiny, "--out", str(desk.run)]
    return words, ["config.json", "format_version 99"]


def run_with_a_config_key_of_the_future(desk: Desk) -> tuple[list[str], list[str]]:
    stated = json.loads((desk.run / "config.json").read_text(encoding="utf-8"))["config"]
    desk.edit(desk.run / "config.json", config={**stated, "warp_speed": 9})
    return ["evaluate", str(desk.run)], ["'warp_speed'"]


def run_with_broken_json(desk: Desk) -> tuple[list[str], list[str]]:
    (desk.run / "data.json").write_text("{", encoding="utf-8")
    return ["evaluate", str(desk.run)], ["data.json", "cannot be read as JSON"]


def run_with_a_key_missing(desk: Desk) -> tuple[list[str], list[str]]:
    desk.edit(desk.run / "data.json", train_split=None)
    return ["evaluate", str(desk.run)], ["data.json", "train_split"]


def truncated_weights(desk: Desk) -> tuple[list[str], list[str]]:
    path = desk.run / "best_model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    return ["evaluate", str(desk.run)], ["best_model.safetensors"]


def empty_weights(desk: Desk) -> tuple[list[str], list[str]]:
    (desk.run / "best_model.safetensors").write_bytes(b"")
    return ["evaluate", str(desk.run)], ["best_model.safetensors"]


def missing_weights(desk: Desk) -> tuple[list[str], list[str]]:
    (desk.run / "best_model.safetensors").unlink()
    return ["evaluate", str(desk.run)], ["no weights at", "best_model.safetensors"]


def damaged_list_of_seen_images(desk: Desk) -> tuple[list[str], list[str]]:
    (desk.run / "seen_images.parquet").write_bytes(b"PAR1 and no more")
    return ["evaluate", str(desk.run)], ["seen_images.parquet"]


def damaged_history(desk: Desk) -> tuple[list[str], list[str]]:
    (desk.run / "history.jsonl").write_text('{"epoch": 1, "rs', encoding="utf-8")
    desk.edit(desk.run / "data.json", data=str(desk.coco.resolve()))
    words = ["train", str(desk.coco), *desk.tiny, "--out", str(desk.run)]
    return words, ["history.jsonl"]


def data_of_a_run_that_is_gone(desk: Desk) -> tuple[list[str], list[str]]:
    desk.edit(desk.run / "data.json", data=str(desk.folder / "gone"))
    return ["search", str(desk.run), "a dog"], ["no data at", "gone"]


def clip_without_data(desk: Desk) -> tuple[list[str], list[str]]:
    return ["search", str(desk.clip), "a dog"], [str(desk.clip), "name the data"]


def out_below_a_file(desk: Desk) -> tuple[list[str], list[str]]:
    path = desk.table("notes.csv", "image,caption\na.jpg,one\n")
    words = ["train", str(desk.coco), *desk.tiny, "--out", str(path / "run")]
    return words, ["notes.csv"]


# -- questions --------------------------------------------------------------------------------
def unreadable_image_to_classify(desk: Desk) -> tuple[list[str], list[str]]:
    broken = desk.folder / "broken.jpg"
    broken.write_bytes(b"no picture")
    words = ["classify", str(desk.run), desk.picture, str(broken), "--labels", "a", "b"]
    return words, ["cannot read the image", "broken.jpg"]


def missing_image_to_classify(desk: Desk) -> tuple[list[str], list[str]]:
    words = ["classify", str(desk.run), str(desk.folder / "gone.jpg"), "--labels", "a", "b"]
    return words, ["cannot read the image", "gone.jpg"]


def captions_to_classify_by(desk: Desk) -> tuple[list[str], list[str]]:
    return ["zeroshot", str(desk.run), str(desk.coco)], ["instances_*2014.json", "squares val"]


def loose_pictures_to_classify(desk: Desk) -> tuple[list[str], list[str]]:
    words = ["zeroshot", str(desk.run), str(desk.coco / "val2014")]
    return words, ["val2014", "a folder for each class"]


def nothing_to_classify(desk: Desk) -> tuple[list[str], list[str]]:
    return ["zeroshot", str(desk.run), "pets"], ["no data at pets"]


def prompts_that_are_not_there(desk: Desk) -> tuple[list[str], list[str]]:
    words = ["zeroshot", str(desk.run), str(desk.coco), "--templates", "prompts.txt"]
    return words, ["no prompt templates at prompts.txt"]


def class_names_that_are_a_list(desk: Desk) -> tuple[list[str], list[str]]:
    path = desk.folder / "names.json"
    path.write_text('["cat"]', encoding="utf-8")
    return ["zeroshot", str(desk.run), str(desk.coco), "--names", str(path)], ["names.json"]


def one_label_only(desk: Desk) -> tuple[list[str], list[str]]:
    return ["classify", str(desk.run), desk.picture, "--labels", "a cat"], ["two", "'a cat'"]


def the_same_label_twice(desk: Desk) -> tuple[list[str], list[str]]:
    words = ["classify", str(desk.run), desk.picture, "--labels", "a cat", "a cat"]
    return words, ["two different labels", "'a cat'"]


def template_without_a_place(desk: Desk) -> tuple[list[str], list[str]]:
    words = ["classify", str(desk.run), desk.picture, "--labels", "a", "b", "--template", "photo"]
    return words, ["template 'photo'", "{}"]


def empty_query(desk: Desk) -> tuple[list[str], list[str]]:
    return ["search", str(desk.run), " "], ["empty query"]


def no_pictures_asked_for(desk: Desk) -> tuple[list[str], list[str]]:
    return ["search", str(desk.run), "a dog", "-k", "0"], ["k=0"]


# -- towers -----------------------------------------------------------------------------------
def image_tower_that_is_no_checkpoint(desk: Desk) -> tuple[list[str], list[str]]:
    words = desk.train(desk.coco, f"image_encoder={desk.coco}")
    return words, ["image encoder", "squares", "no config.json"]


def text_tower_that_is_nowhere(desk: Desk) -> tuple[list[str], list[str]]:
    words = desk.train(desk.coco, "text_encoder=./towers/gone")
    return words, ["text encoder './towers/gone'"]


def batch_norm_for_the_head_of_clip(desk: Desk) -> tuple[list[str], list[str]]:
    both = [f"image_encoder={desk.clip}", f"text_encoder={desk.clip}"]
    return desk.train(desk.coco, *both, "--use-batch-norm"), ["use_batch_norm", "CLIP"]


# -- packs ------------------------------------------------------------------------------------
def pack_words(desk: Desk, *words: str) -> list[str]:
    return ["data", "pack", str(desk.coco), "--out", str(desk.folder / "pack"), *words]


def pack_without_a_folder(desk: Desk) -> tuple[list[str], list[str]]:
    return ["data", "pack", str(desk.coco)], ["--out DIR"]


def pack_of_nothing(desk: Desk) -> tuple[list[str], list[str]]:
    return ["data", "pack", "gone", "--out", "pack"], ["no data at", "gone"]


def pack_of_an_unknown_split(desk: Desk) -> tuple[list[str], list[str]]:
    return pack_words(desk, "--splits", "vall"), ["no split 'vall'", "did you mean 'val'?"]


def pack_of_data_without_a_usual_split(desk: Desk) -> tuple[list[str], list[str]]:
    for split in ("train", "val"):
        desk.annotations(split).rename(desk.annotations(f"{split}s"))
    return pack_words(desk), ["squares has none of the splits", "trains, vals", "--splits"]


def pack_of_a_side_that_shows_nothing(desk: Desk) -> tuple[list[str], list[str]]:
    return pack_words(desk, "--side", "8"), ["--side 8", "32 pixels"]


def pack_of_no_quality(desk: Desk) -> tuple[list[str], list[str]]:
    return pack_words(desk, "--quality", "0"), ["--quality 0", "1 to 100"]


def pack_into_a_file(desk: Desk) -> tuple[list[str], list[str]]:
    words = ["data", "pack", str(desk.coco), "--out", desk.picture]
    return words, [Path(desk.picture).name, "is a file"]


def pack_into_other_files(desk: Desk) -> tuple[list[str], list[str]]:
    words = ["data", "pack", str(desk.coco), "--out", str(desk.run)]
    return words, [str(desk.run), "not empty", "pack.json", "--out"]


def pack_of_another_side_in_its_folder(desk: Desk) -> tuple[list[str], list[str]]:
    assert main(pack_words(desk)) == 0
    words = pack_words(desk, "--side", "128", "--quality", "80", "--splits", "val")
    differing = ["side 256 -> 128", "quality 90 -> 80", "splits train val -> val"]
    return words, [str(desk.folder / "pack"), "another pack", "--out", *differing]


def pack_of_other_data_in_its_folder(desk: Desk) -> tuple[list[str], list[str]]:
    assert main(pack_words(desk)) == 0
    other = desk.folder / "circles"
    shutil.copytree(desk.coco, other)
    words = ["data", "pack", str(other), "--out", str(desk.folder / "pack")]
    return words, ["another pack", "data squares -> circles"]


def pack_of_unreadable_photos(desk: Desk) -> tuple[list[str], list[str]]:
    for path in (desk.coco / "val2014").iterdir():
        path.write_bytes(b"no picture")
    return pack_words(desk, "--splits", "val"), ["none of the 8 photos of squares can be read"]


def check_of_no_pack(desk: Desk) -> tuple[list[str], list[str]]:
    return ["data", "pack", str(desk.coco), "--check"], ["no pack in", "squares", "pack.json"]


def unknown_split_of_a_pack(desk: Desk) -> tuple[list[str], list[str]]:
    assert main(pack_words(desk)) == 0
    words = ["evaluate", str(desk.run), str(desk.folder / "pack"), "--split", "vall"]
    return words, ["no split 'vall' in the pack", "did you mean 'val'?"]


def pack_with_a_shard_gone(desk: Desk) -> tuple[list[str], list[str]]:
    assert main(pack_words(desk)) == 0
    (desk.folder / "pack" / "val-00000.arrow").unlink()
    words = ["evaluate", str(desk.run), str(desk.folder / "pack")]
    return words, ["val-00000.arrow is not there", "captune data pack"]


def pack_of_another_version(desk: Desk) -> tuple[list[str], list[str]]:
    assert main(pack_words(desk)) == 0
    desk.edit(desk.folder / "pack" / "pack.json", format_version=99)
    words = ["evaluate", str(desk.run), str(desk.folder / "pack")]
    return words, ["pack.json", "format_version 99", "reads 1"]


def row_that_a_shard_has_not(desk: Desk) -> tuple[list[str], list[str]]:
    assert main(pack_words(desk)) == 0
    address = str(desk.folder / "pack" / "val-00000.arrow::8")
    words = ["classify", str(desk.run), address, "--labels", "a", "b"]
    return words, ["cannot read the image", address, "has no row 8"]


# -- numbers ----------------------------------------------------------------------------------
def no_scenes_to_draw(desk: Desk) -> tuple[list[str], list[str]]:
    return ["data", "demo", str(desk.folder / "scenes"), "--images", "0"], ["0", "train"]


def scenes_drawn_over_other_data(desk: Desk) -> tuple[list[str], list[str]]:
    return ["data", "demo", str(desk.coco), "--images", "2"], ["squares", "annotations"]


def scenes_drawn_into_a_file(desk: Desk) -> tuple[list[str], list[str]]:
    return ["data", "demo", desk.picture, "--images", "2"], [Path(desk.picture).name]


CASES: list[Case] = [
    missing_folder,
    folder_without_annotations,
    no_annotation_file_for_the_split,
    json_without_images,
    json_that_is_a_list,
    broken_json,
    caption_of_an_unknown_image,
    entry_without_file_name,
    no_captions,
    every_image_missing,
    every_image_unreadable,
    unknown_split,
    karpathy_test_of_a_sample,
    column_options_for_a_folder,
    csv_without_image_column,
    csv_without_caption_column,
    unknown_caption_column,
    unknown_image_column,
    template_with_unknown_column,
    template_without_column,
    csv_of_another_encoding,
    empty_csv,
    csv_of_a_header_alone,
    csv_of_empty_captions,
    csv_with_ragged_rows,
    csv_whose_images_are_all_missing,
    csv_without_validation_rows,
    missing_validation_table,
    table_of_another_suffix,
    broken_jsonl,
    broken_parquet,
    missing_run,
    folder_that_is_no_run,
    run_of_another_version,
    weights_description_of_another_version,
    run_of_another_version_as_out,
    run_with_a_config_key_of_the_future,
    run_with_broken_json,
    run_with_a_key_missing,
    truncated_weights,
    empty_weights,
    missing_weights,
    damaged_list_of_seen_images,
    damaged_history,
    data_of_a_run_that_is_gone,
    clip_without_data,
    out_below_a_file,
    unreadable_image_to_classify,
    missing_image_to_classify,
    captions_to_classify_by,
    loose_pictures_to_classify,
    nothing_to_classify,
    prompts_that_are_not_there,
    class_names_that_are_a_list,
    one_label_only,
    the_same_label_twice,
    template_without_a_place,
    empty_query,
    no_pictures_asked_for,
    image_tower_that_is_no_checkpoint,
    text_tower_that_is_nowhere,
    batch_norm_for_the_head_of_clip,
    pack_without_a_folder,
    pack_of_nothing,
    pack_of_an_unknown_split,
    pack_of_data_without_a_usual_split,
    pack_of_a_side_that_shows_nothing,
    pack_of_no_quality,
    pack_into_a_file,
    pack_into_other_files,
    pack_of_another_side_in_its_folder,
    pack_of_other_data_in_its_folder,
    pack_of_unreadable_photos,
    check_of_no_pack,
    unknown_split_of_a_pack,
    pack_with_a_shard_gone,
    pack_of_another_version,
    row_that_a_shard_has_not,
    no_scenes_to_draw,
    scenes_drawn_over_other_data,
    scenes_drawn_into_a_file,
    a_protocol_that_is_not_there,
    a_protocol_of_another_split,
    a_protocol_whose_split_is_not_whole,
    plausible_matches_of_another_split,
    plausible_matches_of_another_protocol,
    plausible_matches_of_a_sample,
    pmrp_of_an_empty_folder,
    hubness_of_another_protocol,
    against_nothing,
    a_checkpoint_that_is_not_there,
    a_misspelt_run,
    blend_of_other_towers,
    blend_of_one_step,
    blend_into_a_run,
    hubness_without_a_run,
    hubness_of_the_training_images,
]


@pytest.mark.parametrize("case", CASES)
def test_wrong_input_is_answered_by_one_line_that_names_it(
    case: Case, desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    words, expected = case(desk)
    capsys.readouterr()  # of what the case itself did
    assert main(words) == 2
    expect_one_line(*capsys.readouterr(), expected)


def expect_one_line(printed: str, said: str, expected: list[str]) -> None:
    """Progress and notes may come before; the error is the last line and the only one."""
    assert printed == ""
    lines = said.strip().splitlines()
    errors = [line for line in lines if line.startswith("captune: error: ")]
    assert errors == lines[-1:], said
    for word in expected:
        assert word in errors[0]
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("batch_size=many", ["batch_size", "int", "'many'"]),
        ("batch_size=4.5", ["batch_size", "int", "'4.5'"]),
        ("batch_size=1", ["batch_size", "at least 2", "1"]),
        ("batch_size=", ["batch_size", "int", "''"]),
        ("num_epochs=0", ["num_epochs", "at least 1", "0"]),
        ("learning_rate=fast", ["learning_rate", "float", "'fast'"]),
        ("learning_rate=0", ["learning_rate", "above 0", "0"]),
        ("learning_rate=nan", ["learning_rate", "finite", "nan"]),
        ("learning_rate=inf", ["learning_rate", "finite", "inf"]),
        ("weight_decay=-0.1", ["weight_decay", "at least 0", "-0.1"]),
        ("temperature=0", ["temperature", "above 0", "0"]),
        ("seed=-1", ["seed", "at least 0", "-1"]),
        ("seed=2147483648", ["seed", "at most", "2147483648"]),
        ("use_batch_norm=perhaps", ["use_batch_norm", "bool", "'perhaps'"]),
        ("recipe=fancy", ["recipe", "'fancy'", "plain"]),
        ("towers=resnet50", ["towers", "'resnet50'", "clip-resnet50"]),
        ("precision=fp64", ["precision", "'fp64'"]),
        ("log_with=paper", ["log_with", "'paper'"]),
    ],
)
def test_a_config_value_of_the_wrong_type_or_range_is_named(
    override: str, expected: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(tmp_path), override]) == 2
    expect_one_line(*capsys.readouterr(), expected)


def test_an_error_is_one_line_even_where_its_cause_has_several(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights of another architecture: torch lists every key on a line of its own."""
    path = desk.run / "image_encoder.json"
    stated = json.loads(path.read_text(encoding="utf-8"))
    stated["hidden_dim"] = 64
    path.write_text(json.dumps(stated), encoding="utf-8")
    assert main(["evaluate", str(desk.run)]) == 2
    expect_one_line(*capsys.readouterr(), ["best_model.safetensors", "does not fit", "size"])


# -- a hub that does not answer ---------------------------------------------------------------
@pytest.fixture
def silent_hub() -> Iterator[str]:
    """A server that takes every connection and never says a word."""
    held: list[socket.socket] = []
    server = socket.create_server(("127.0.0.1", 0))

    def take() -> None:
        while True:
            try:
                held.append(server.accept()[0])
            except OSError:  # closed: the test is over
                return

    thread = threading.Thread(target=take, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.getsockname()[1]}"
    # accept() does not wake up by itself when its socket is closed.
    with contextlib.suppress(OSError):  # macOS refuses it on a listening socket
        server.shutdown(socket.SHUT_RDWR)
    server.close()
    thread.join(timeout=5)
    for connection in held:
        connection.close()


TIMED = """
import sys, time
import captune.workflow.evaluate, captune.workflow.train
from captune.cli.main import main
start = time.monotonic()
code = main(sys.argv[1:])
print(time.monotonic() - start)
sys.exit(code)
"""


def ask(hub: str, folder: Path, *words: str) -> tuple[float, str, int]:
    """The command's seconds without the start of Python and imports, its stderr and exit code."""
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": hub, "HF_HOME": str(folder / "hub"), "NO_PROXY": "127.0.0.1"}
    answer = subprocess.run(
        [sys.executable, "-c", TIMED, *words],
        capture_output=True,
        text=True,
        env=environment,
        cwd=folder,
        timeout=90,
    )
    return float(answer.stdout), answer.stderr, answer.returncode


def test_a_hub_that_never_answers_fails_within_ten_seconds_and_says_what_would_serve(
    silent_hub: str, tmp_path: Path
) -> None:
    write_split(tmp_path / "squares", "train", 4)
    write_split(tmp_path / "squares", "val", 2, first=5)
    seconds, said, code = ask(silent_hub, tmp_path, "train", "squares", "num_workers=0")
    assert (code, seconds < 10) == (2, True), f"{seconds:.1f} s: {said}"
    serves = ["microsoft/resnet-50", "folder", "--towers minilm-lite0", "captune[demo]"]
    expect_one_line("", said, serves)


def test_a_port_where_no_hub_listens_fails_at_once_in_place_of_a_run(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    write_split(tmp_path / "squares", "val", 2)
    hub = f"http://127.0.0.1:{port}"
    seconds, said, code = ask(hub, tmp_path, "evaluate", "openai/clip-vit-base-patch32", "squares")
    assert (code, seconds < 10) == (2, True), f"{seconds:.1f} s: {said}"
    expect_one_line("", said, ["openai/clip-vit-base-patch32", "folder"])
