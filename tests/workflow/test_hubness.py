"""Hubness corrected with the captions that a run was trained on, and with no others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from captune.bank import CaptionBank
from captune.data.sources import open_source
from captune.data.tabular import TableOptions
from captune.errors import CaptuneError
from captune.workflow import hubness as hubness_module
from captune.workflow.evaluate import evaluate
from captune.workflow.hubness import Querybank
from captune.workflow.opening import open_model, open_table


def test_hubness_is_an_object_apart_and_the_rest_stays(run: Path) -> None:
    plain = evaluate(str(run), split="fresh")
    both = evaluate(str(run), split="fresh", hubness=True)
    corrected = both.pop("hubness_corrected")
    assert both == plain
    assert corrected["queries"] == 120 and corrected["queries_left_out"] == 0
    assert corrected["image_to_text"].keys() == plain["image_to_text"].keys()
    kept = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    assert kept == {**plain, "hubness_corrected": corrected}


def test_the_querybank_is_the_train_captions_and_nothing_else(
    run: Path, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All texts that reach the correction are the evaluated split's and the training split's."""
    seen: list[Any] = []

    def keep(image: Any, text: Any, owner: Any, bank: Any, **_: Any) -> dict[str, Any]:
        seen.append((text, bank))
        return {}

    monkeypatch.setattr(hubness_module, "hubness_corrected", keep)
    evaluate(str(run), split="val", hubness=True)
    ((text, bank),) = seen
    encoder = open_model(str(run)).model.text_encoder
    for split, found in (("val", text), ("train", bank)):
        wanted = CaptionBank.build(open_source(data, TableOptions()).table(split).texts(), encoder)
        assert torch.equal(found, wanted.all())


def test_train_captions_of_evaluated_images_are_left_out_aloud(
    run: Path, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    train = open_source(data, TableOptions()).table("train")
    queries = Querybank.of(open_model(str(run)), train.take_images([3, 17]))
    assert len(queries.rows) == 110 and queries.left_out == 10
    assert not set(train.image_of_caption[queries.rows]) & {3, 17}
    assert "10 training captions left out" in capsys.readouterr().err


def test_a_large_bank_is_thinned_evenly(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_model(str(run))
    monkeypatch.setattr(hubness_module, "MAX_QUERIES", 60)
    queries = Querybank.of(opened, open_table(opened, None, "val", TableOptions()))
    assert len(set(queries.rows)) == 60 and (queries.rows[0], queries.rows[-1]) == (0, 119)


def test_hubness_on_the_training_images_themselves_is_refused(run: Path) -> None:
    with pytest.raises(CaptuneError, match=r"all images of squares train: .* are evaluated"):
        evaluate(str(run), split="train", hubness=True)


def test_hubness_without_a_run_or_its_data_is_refused(
    run: Path, data: str, tiny_clip: Path
) -> None:
    with pytest.raises(CaptuneError, match="is no run"):
        evaluate(str(tiny_clip), data=data, hubness=True)
    path = run / "data.json"
    stated = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**stated, "data": ""}), encoding="utf-8")
    with pytest.raises(CaptuneError, match="does not say where its data lies"):
        evaluate(str(run), data=data, hubness=True)
