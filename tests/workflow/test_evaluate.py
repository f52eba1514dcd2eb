"""evaluate, search and classify with a run, or with a CLIP in its place."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from captune.config import Config
from captune.data.sources import open_source
from captune.data.table import CaptionTable
from captune.data.tabular import TableOptions
from captune.errors import CaptuneError
from captune.evaluation.embeddings import ImageEmbeddings
from captune.evaluation.plausible import GroundTruth, Ids
from captune.evaluation.protocols import PROTOCOLS, Protocol
from captune.training.run import Run
from captune.workflow import evaluate as evaluate_module
from captune.workflow.evaluate import (
    classify_files,
    evaluate,
    search,
)
from captune.workflow.opening import OwnTowers, open_model, open_table
from captune.workflow.train import train

OWN_TOWERS = '''
"""Towers of the user's own, as the command line takes them."""

from pathlib import Path

import torch
from torch import nn

from captune.encoders.image import Features
from captune.preprocess import Preprocess

Path("imported.txt").write_text("this module was imported", encoding="utf-8")


class Squares(nn.Module):
    name = "own-squares"
    feature_dim = 12
    preprocess = Preprocess(32)

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 8, 8)

    def forward(self, pixels):
        found = self.patches(pixels)
        return Features(found.mean((2, 3)), found)

    def description(self):
        return {"kind": "own", "name": self.name}


class Letters:
    name = "own-letters"
    dimension = 16
    fingerprint = "letters, first edition"

    def encode(self, texts):
        counts = torch.ones(len(texts), 16)
        for row, text in enumerate(texts):
            for letter in text:
                counts[row, ord(letter) % 16] += 1
        return nn.functional.normalize(counts, dim=-1)


class OtherLetters(Letters):
    fingerprint = "letters, second edition"


def nothing():
    return None
'''


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder holds ``own_towers.py``, which leaves a mark when it is imported."""
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "own_towers.py").write_text(OWN_TOWERS, encoding="utf-8")
    monkeypatch.chdir(folder)
    # A list of the test's own: captune adds the current folder to the path of imports.
    monkeypatch.setattr(sys, "path", [*sys.path])
    sys.modules.pop("own_towers", None)
    yield folder
    sys.modules.pop("own_towers", None)


def edit(path: Path, **changes: Any) -> None:
    value = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**value, **changes}), encoding="utf-8")


# -- evaluate ---------------------------------------------------------------------------------
def test_evaluate_writes_exactly_the_object_that_it_returns(run: Path) -> None:
    result = evaluate(str(run))
    assert json.loads((run / "metrics.json").read_text(encoding="utf-8")) == result
    assert {"images", "captions", "split", "image_to_text", "text_to_image", "rsum"} <= set(result)


def test_evaluate_replaces_the_metrics_of_an_earlier_split(run: Path) -> None:
    first = evaluate(str(run))
    second = evaluate(str(run), split="train")
    assert (first["split"], first["images"], first["captions"]) == ("val", 8, 40)
    assert (second["split"], second["images"], second["captions"]) == ("train", 24, 120)
    assert json.loads((run / "metrics.json").read_text(encoding="utf-8")) == second


def test_the_training_split_is_called_no_held_out_result(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = evaluate(str(run), split="train")
    assert (result["images_seen_in_training"], result["images_seen_in_selection"]) == (24, 0)
    assert len(result["notes"]) == 1 and "24 of these images were trained on" in result["notes"][0]
    assert result["notes"][0] in capsys.readouterr().err


def test_the_split_that_chose_the_epoch_is_called_optimistic(run: Path) -> None:
    result = evaluate(str(run), split="val")
    assert (result["images_seen_in_training"], result["images_seen_in_selection"]) == (0, 8)
    assert len(result["notes"]) == 1 and "chosen on 8 of these images" in result["notes"][0]


def test_images_that_the_run_never_saw_need_no_note(run: Path) -> None:
    result = evaluate(str(run), split="fresh")
    assert (result["images_seen_in_training"], result["images_seen_in_selection"]) == (0, 0)
    assert result["notes"] == []


def test_a_part_of_the_training_images_in_another_copy_is_noticed(
    run: Path, data: str, tmp_path: Path
) -> None:
    """By file name: the copy lies elsewhere, and only five of its images were trained on."""
    copy = Path(shutil.copytree(data, tmp_path / "copy"))
    annotations = copy / "annotations"
    mixed = json.loads((annotations / "captions_fresh2014.json").read_text(encoding="utf-8"))
    trained = json.loads((annotations / "captions_train2014.json").read_text(encoding="utf-8"))
    taken = trained["images"][:5]
    for image in taken:
        shutil.copy(copy / "train2014" / image["file_name"], copy / "fresh2014")
    ids = {image["id"] for image in taken}
    mixed["images"] += taken
    mixed["annotations"] += [a for a in trained["annotations"] if a["image_id"] in ids]
    (annotations / "captions_fresh2014.json").write_text(json.dumps(mixed), encoding="utf-8")
    result = evaluate(str(run), data=str(copy), split="fresh")
    assert (result["images"], result["images_seen_in_training"]) == (11, 5)


def test_unreadable_images_are_counted_and_their_captions_left_out(
    run: Path, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(data, tmp_path / "copy"))
    broken = sorted((copy / "val2014").iterdir())[3]
    broken.write_bytes(b"no picture")
    result = evaluate(str(run), data=str(copy))
    assert (result["images"], result["captions"], result["unreadable_images"]) == (7, 35, 1)
    assert broken.name in capsys.readouterr().err


def test_a_run_stands_alone_wherever_its_folder_is_moved(run: Path, tmp_path: Path) -> None:
    here = evaluate(str(run))
    there = evaluate(str(shutil.move(run, tmp_path / "elsewhere")))
    same = set(here) - {"model"}
    assert {key: here[key] for key in same} == {key: there[key] for key in same}


def test_a_run_finds_its_validation_table_from_any_folder(
    data: str, tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both tables were named from the folder that was the current one when it was trained."""
    from captune.data.tabular import TableOptions

    work = tmp_path / "work"
    work.mkdir()
    photos = sorted((Path(data) / "train2014").iterdir())
    for name, chosen in (("photos.csv", photos[:16]), ("held-out.csv", photos[16:20])):
        rows = [f"{photo},photo number {number}" for number, photo in enumerate(chosen)]
        (work / name).write_text("\n".join(["image,caption", *rows]), encoding="utf-8")
    monkeypatch.chdir(work)
    options = TableOptions(val="held-out.csv")
    run = train("photos.csv", config=tiny_config, out="run", options=options).run.folder
    monkeypatch.chdir(tmp_path)
    assert evaluate(str(work / run.name))["images"] == 4


# -- a CLIP in place of a run -----------------------------------------------------------------
def test_a_clip_folder_is_measured_zero_shot_and_left_as_it_is(tiny_clip: Path, data: str) -> None:
    before = sorted(path.name for path in tiny_clip.iterdir())
    result = evaluate(str(tiny_clip), data=data)
    assert (result["split"], result["images"], result["captions"]) == ("val", 8, 40)
    assert result["model"] == str(tiny_clip) and result["notes"] == []
    six = [result[d][f"R@{k}"] for d in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
    assert result["rsum"] == pytest.approx(sum(six)) and 0 < result["rsum"] <= 600
    assert sorted(path.name for path in tiny_clip.iterdir()) == before


def test_a_clip_folder_says_the_same_as_transformers(tiny_clip: Path, data: str) -> None:
    """Scored by transformers' own CLIPModel, a picture and a text at a time."""
    import torch
    from transformers import AutoTokenizer, CLIPModel

    from captune.data.pixels import load_image, resize_and_crop

    model = CLIPModel.from_pretrained(tiny_clip).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_clip)
    opened = open_model(str(tiny_clip)).model
    assert float(opened.logit_scale) == pytest.approx(100)
    mean = torch.tensor(opened.preprocess.mean).view(1, 3, 1, 1)
    std = torch.tensor(opened.preprocess.std).view(1, 3, 1, 1)
    for hit in search(str(tiny_clip), "a dog on a cat", data=data, k=3):
        pixels = torch.from_numpy(resize_and_crop(load_image(hit.image), 32))[None] / 255
        with torch.no_grad():
            output = model(
                pixel_values=(pixels - mean) / std,
                **tokenizer("a dog on a cat", return_tensors="pt"),
            )
        cosine = output.logits_per_image.item() / model.logit_scale.exp().item()
        # captune may compute images in bf16 where the processor does so natively.
        assert hit.score == pytest.approx(cosine, abs=0.02)


def test_a_clip_needs_its_data_named(tiny_clip: Path) -> None:
    with pytest.raises(CaptuneError, match="is no run: name the data"):
        evaluate(str(tiny_clip))


def test_a_backbone_without_text_tower_is_no_clip(tiny_resnet: Path, data: str) -> None:
    with pytest.raises(CaptuneError, match="no CLIP checkpoint with both towers"):
        evaluate(str(tiny_resnet), data=data)


# -- search and classify ----------------------------------------------------------------------
def test_search_looks_through_the_validation_split_of_the_run(run: Path, data: str) -> None:
    hits = search(str(run), "a red square", k=100)
    found = sorted(Path(hit.image) for hit in hits)
    assert found == sorted((Path(data).resolve() / "val2014").iterdir())
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_search_looks_through_the_split_that_is_named(run: Path) -> None:
    hits = search(str(run), "a red square", k=100, split="fresh")
    assert len(hits) == 6 and {Path(hit.image).parent.name for hit in hits} == {"fresh2014"}


def test_the_second_search_reuses_the_embeddings_kept_in_the_run(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = search(str(run), "a red square", split="fresh")

    def no_computing(*_: Any) -> None:
        raise AssertionError("the images were embedded a second time")

    monkeypatch.setattr("captune.evaluation.embeddings._embed", no_computing)
    again = search(str(run), "a red square", split="fresh")
    assert [hit.image for hit in again] == [hit.image for hit in first]
    assert [hit.score for hit in again] == pytest.approx([hit.score for hit in first], abs=1e-6)


def test_classify_names_the_unreadable_file(run: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    with pytest.raises(CaptuneError, match=r"cannot read the image .*broken\.jpg"):
        classify_files(str(run), [str(tmp_path / "broken.jpg")], ["a", "b"])


# -- towers of one's own ----------------------------------------------------------------------
def test_a_run_with_an_own_image_tower_is_trained_and_reopened_with_it(
    own: Path, coco: Path, tiny_config: Config
) -> None:
    config = tiny_config.replace(image_encoder="own_towers:Squares")
    trained = train(str(coco), config=config, out="run")
    again = evaluate("run", own=OwnTowers(image_encoder="own_towers:Squares"))
    assert again["rsum"] == pytest.approx(trained.metrics["rsum"])


def test_a_run_with_an_own_text_tower_is_trained_and_reopened_with_it(
    own: Path, coco: Path, tiny_config: Config
) -> None:
    config = tiny_config.replace(text_encoder="own_towers:Letters")
    trained = train(str(coco), config=config, out="run")
    again = evaluate("run", own=OwnTowers(text_encoder="own_towers:Letters"))
    assert again["rsum"] == pytest.approx(trained.metrics["rsum"])


@pytest.fixture
def own_run(own: Path, coco: Path, tiny_config: Config) -> Path:
    """A run of both own towers, and no module of theirs imported any more."""
    from captune.training.fit import fit
    from captune.training.run import Provenance

    source = open_source(coco)
    config = tiny_config.replace(
        image_encoder="own_towers:Squares", text_encoder="own_towers:Letters"
    )
    tables = source.table("train"), source.table("val")
    fit(*tables, out="run", config=config, provenance=Provenance(str(coco)))
    sys.modules.pop("own_towers")
    (own / "imported.txt").unlink()
    return own / "run"


def test_without_the_own_image_tower_its_run_is_refused_and_the_option_named(
    own_run: Path,
) -> None:
    with pytest.raises(CaptuneError, match=r"'own-squares'.*--image-encoder package\.module"):
        evaluate(str(own_run))


def test_without_the_own_text_tower_its_run_is_refused_and_the_option_named(
    own_run: Path,
) -> None:
    with pytest.raises(CaptuneError, match=r"'own-letters'.*--text-encoder package\.module"):
        evaluate(str(own_run), own=OwnTowers(image_encoder="own_towers:Squares"))


def test_an_own_text_tower_of_another_fingerprint_is_refused(own_run: Path) -> None:
    towers = OwnTowers("own_towers:Squares", "own_towers:OtherLetters")
    with pytest.raises(CaptuneError, match="not the one the run was trained with"):
        evaluate(str(own_run), own=towers)


@pytest.mark.parametrize(
    ("factory", "word"),
    [
        ("own_towers:Gone", "no attribute 'Gone'"),
        ("no_such_module:Squares", "No module named 'no_such_module'"),
        ("own_towers:nothing", "made a NoneType"),
        ("own_towers:Letters", "made a Letters"),
    ],
)
def test_a_factory_that_makes_no_image_tower_is_named(
    factory: str, word: str, own_run: Path
) -> None:
    with pytest.raises(CaptuneError, match=word) as caught:
        evaluate(str(own_run), own=OwnTowers(image_encoder=factory))
    assert factory in str(caught.value)


# -- a run is data, not code ------------------------------------------------------------------
def test_opening_a_run_imports_no_module_that_its_config_names(own_run: Path, own: Path) -> None:
    with pytest.raises(CaptuneError):
        evaluate(str(own_run))
    assert not (own / "imported.txt").exists()


@pytest.mark.parametrize("kind", ["named", "own", "other"])
def test_a_text_tower_name_in_a_run_is_never_imported(kind: str, run: Path, own: Path) -> None:
    """A run that was downloaded must not choose what code runs."""
    edit(run / "text_encoder.json", kind=kind, name="own_towers:Letters")
    with pytest.raises(CaptuneError):
        evaluate(str(run))
    assert not (own / "imported.txt").exists()


@pytest.mark.parametrize("kind", ["own", "transformers", "efficientnet-lite0"])
def test_an_image_tower_name_in_a_run_is_never_imported(kind: str, run: Path, own: Path) -> None:
    path = run / "image_encoder.json"
    encoder = json.loads(path.read_text(encoding="utf-8"))["encoder"]
    hostile = {"auto_map": {"AutoModel": "own_towers.Squares", "AutoConfig": "own_towers.Squares"}}
    encoder |= {"kind": kind, "name": "own_towers:Squares"}
    edit(path, encoder={**encoder, "config": {**encoder["config"], **hostile}})
    # Refused is as good as ignored: what counts is that nothing was imported.
    with contextlib.suppress(CaptuneError):
        evaluate(str(run))
    assert not (own / "imported.txt").exists()


def test_a_criterion_name_in_a_run_is_never_imported(run: Path, own: Path) -> None:
    config = dict(Run.open(run).config) | {"criterion": "own_towers:nothing"}
    edit(run / "config.json", config=config)
    evaluate(str(run))
    assert not (own / "imported.txt").exists()


# -- what is no run ---------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["", "nowhere", "./nowhere/at/all", "~nobody/run", "a/b/c"])
def test_a_name_that_is_neither_folder_nor_hub_name_is_refused(name: str, own: Path) -> None:
    with pytest.raises(CaptuneError, match=r"captune train"):
        open_model(name)


# -- matches that the captions do not list ----------------------------------------------------
class Anything(GroundTruth):
    """Ground truth that is of any table, for a test of what lies around it."""

    def check(self, image_ids: Ids, caption_ids: Ids) -> None:
        assert (len(image_ids), len(caption_ids)) == (6, 30)


@pytest.mark.parametrize(("protocol", "split"), [("full", None), ("coco-5k", "karpathy-test")])
def test_ground_truth_chooses_the_split_and_adds_an_object_apart(
    protocol: str, split: str | None, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = evaluate(str(run), split="fresh")
    asked: list[str | None] = []
    given: list[Any] = []

    def fresh(opened: Any, data: Any, split: str | None, options: Any) -> CaptionTable:
        asked.append(split)
        return open_table(opened, data, "fresh", options)

    def keep(*arguments: Any) -> dict[str, Any]:
        given.append(arguments)
        return {"cxc": {}}

    monkeypatch.setattr(evaluate_module, "open_table", fresh)
    monkeypatch.setattr(evaluate_module, "plausible_matches", keep)
    # The protocol is bound to the split that stands for it here.
    monkeypatch.setattr(Protocol, "check", lambda *_: None)
    truth = Anything(None)
    result = evaluate(str(run), protocol=protocol, split=split, truth=truth)
    assert asked == ["karpathy-test"]
    assert json.loads((run / "metrics.json").read_text(encoding="utf-8")) == result
    assert result.pop("plausible") == {"cxc": {}}
    assert result == {**plain, "protocol": PROTOCOLS[protocol].stamp()}

    ((image, text, image_ids, caption_ids, handed),) = given
    table = open_table(open_model(str(run)), None, "fresh", TableOptions())
    assert image_ids.tolist() == table.images["image_id"].to_pylist()
    assert caption_ids.tolist() == table.captions["caption_id"].to_pylist()
    assert len(image) == 6 and len(text) == 30 and handed is truth


def test_a_whole_coco_is_measured_with_all_ground_truth(
    whole_coco: Path, tiny_clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its images are empty files, so that their embeddings are made up."""

    def made_up(opened: Any, table: CaptionTable) -> ImageEmbeddings:
        generator = torch.Generator().manual_seed(0)
        vectors = torch.randn(len(table), 16, generator=generator)
        return ImageEmbeddings(np.arange(len(table)), normalize(vectors, dim=-1), 0)

    monkeypatch.setattr(evaluate_module, "embed", made_up)
    result = evaluate(str(tiny_clip), data=str(whole_coco), truth=GroundTruth.load())
    assert (result["split"], result["images"], result["captions"]) == (
        "karpathy-test",
        5000,
        25_000,
    )
    found = result["plausible"]
    assert found["cxc"]["text_to_image"]["queries"] == 24_972
    for direction in ("image_to_text", "text_to_image"):
        assert found["eccv"][direction]["R@1"] < 5
        assert 0 < found["cxc"][direction]["R@10"] < 5


def test_a_protocol_of_one_split_takes_it_unless_another_is_named(run: Path) -> None:
    with pytest.raises(CaptuneError, match="karpathy-test needs all of COCO's val2014"):
        evaluate(str(run), protocol="coco-5k")
    with pytest.raises(CaptuneError, match=r"coco-5k is defined on karpathy-test, .* squares val"):
        evaluate(str(run), protocol="coco-5k", split="val")


def test_two_models_are_compared_in_pairs_on_the_same_images(
    outcome: Any, tiny_clip: Path, coco: Path, tmp_path: Path
) -> None:
    folder = str(shutil.copytree(outcome.run.folder, tmp_path / "run"))
    alone = evaluate(str(tiny_clip), data=str(coco), split="val")
    found = evaluate(folder, data=str(coco), split="val", against=str(tiny_clip))
    other = found["against"]
    assert other["model"] == str(tiny_clip) and other["rsum"] == alone["rsum"]
    assert other["fingerprints"] != found["fingerprints"]
    for direction in ("image_to_text", "text_to_image"):
        for key, difference in other["difference"][direction].items():
            expected = found[direction][key] - alone[direction][key]
            assert difference["value"] == pytest.approx(expected)
            assert difference["low"] <= difference["value"] <= difference["high"]
    assert other["difference"]["rsum"]["value"] == pytest.approx(found["rsum"] - alone["rsum"])


def test_a_result_states_its_protocol_and_its_intervals(outcome: Any, tmp_path: Path) -> None:
    folder = str(shutil.copytree(outcome.run.folder, tmp_path / "run"))
    full, easier = (evaluate(folder, protocol=name) for name in ("full", "one-caption"))
    assert (full["captions"], easier["captions"], easier["images"]) == (40, 8, 8)
    assert easier["protocol"]["name"] == "one-caption"
    for result in (full, easier):
        low, high = result["intervals"]["text_to_image"]["R@5"]
        assert low <= result["text_to_image"]["R@5"] <= high
    assert full["fingerprints"]["model"] == easier["fingerprints"]["model"]
