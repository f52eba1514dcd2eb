"""A run directory: one variant, one version, refused rather than overwritten."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from captune.config import DEFAULT_CONFIG, Config
from captune.data.tabular import TableOptions
from captune.errors import CaptuneError
from captune.training.run import Provenance, Run, free_name


def create(folder: Path, config: Config, provenance: Provenance) -> Run:
    run = Run.claim(folder, config, provenance)
    run.write_identity()
    return run


def test_what_is_created_is_what_is_opened(tmp_path: Path) -> None:
    options = TableOptions("img", ("a", "b"), "", "val.csv")
    provenance = Provenance("photos.csv", options, "train", "val")
    config = DEFAULT_CONFIG.replace(use_batch_norm=True, seed=3)
    create(tmp_path / "run", config, provenance)
    run = Run.open(tmp_path / "run")
    assert run.config == config and run.provenance == provenance
    assert run.output("metrics", ".json").name == "metrics_bn.json"
    assert run.weights_path.name == "best_model_bn.safetensors"


def test_another_configuration_is_refused_with_a_free_name(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    create(folder, DEFAULT_CONFIG, Provenance())
    (tmp_path / "run-2").mkdir()
    with pytest.raises(CaptuneError, match=r"batch_size 128 -> 64.*--out .*run-3"):
        create(folder, DEFAULT_CONFIG.replace(batch_size=64), Provenance())
    with pytest.raises(CaptuneError, match=r"data  -> a\.csv"):
        create(folder, DEFAULT_CONFIG, Provenance("a.csv"))
    assert Run.open(folder).config == DEFAULT_CONFIG


def test_machine_matters_may_change(tmp_path: Path) -> None:
    create(tmp_path / "run", DEFAULT_CONFIG, Provenance())
    changed = DEFAULT_CONFIG.replace(
        num_workers=3, precision="fp32", save_steps=7, compile_backbone="off"
    )
    assert create(tmp_path / "run", changed, Provenance()).config == changed


def test_chunks_are_a_machine_matter_unless_batch_norm_counts_them(tmp_path: Path) -> None:
    for frozen in (True, False):
        folder, config = tmp_path / str(frozen), DEFAULT_CONFIG.replace(freeze_batch_norm=frozen)
        create(folder, config, Provenance())
        changed = config.replace(chunk_size=32)
        if frozen:
            assert create(folder, changed, Provenance()).config == changed
        else:
            with pytest.raises(CaptuneError, match="chunk_size 0 -> 32"):
                create(folder, changed, Provenance())


def test_a_folder_of_other_things_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(CaptuneError, match="not empty and holds no run"):
        create(tmp_path, DEFAULT_CONFIG, Provenance())
    with pytest.raises(CaptuneError, match="not empty and holds no run"):
        create(tmp_path / "thesis.txt", DEFAULT_CONFIG, Provenance())


def test_another_version_is_refused(tmp_path: Path) -> None:
    create(tmp_path / "run", DEFAULT_CONFIG, Provenance())
    path = tmp_path / "run" / "config.json"
    stated = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**stated, "format_version": 2}), encoding="utf-8")
    with pytest.raises(CaptuneError, match="format_version 2, this captune reads 1"):
        Run.open(tmp_path / "run")


def test_no_run_there(tmp_path: Path) -> None:
    with pytest.raises(CaptuneError, match="no run at"):
        Run.open(tmp_path / "nowhere")


def test_free_names_are_free(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert free_name(tmp_path / "run") == tmp_path / "run-2"
