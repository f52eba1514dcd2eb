"""fit in two stages: the head on kept features, then the whole tower; resumed anywhere."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from captune.config import Config
from captune.data.sources import open_source
from captune.data.table import CaptionTable
from captune.losses import ContrastiveLoss, InfoNCELoss
from captune.metrics import retrieval_metrics
from captune.models import CLIPModel
from captune.training import loop as loop_module
from captune.training.average import MovingAverage
from captune.training.checkpoints import checkpoint_weights
from captune.training.fit import fit
from captune.training.run import Run
from captune.training.stages import Plan
from captune.training.stop import TrainingStopped
from conftest import write_split

Tables = tuple[CaptionTable, CaptionTable]
CLOCK = ("images_per_second", "seconds")


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.weights_path)


def same_weights(one: Run, other: Run) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def timeless(run: Run) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in run.history()]


@pytest.mark.parametrize("recipe", ["best", "best-adapter"])
def test_two_stages_from_end_to_end(
    tables: Tables, best: Config, tmp_path: Path, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = best.replace(recipe=recipe)
    run = fit(*tables, out=tmp_path / "run", config=config)
    said = capsys.readouterr().err
    assert [(row["epoch"], row["stage"]) for row in run.history()] == [
        (1, 1),
        (2, 1),
        (3, 2),
        (4, 2),
    ]
    assert [row["step"] for row in run.history()] == [3, 6, 9, 12]
    assert said.startswith(f"recipe {recipe} · ")
    assert said.count("stage 1: the head") == said.count("stage 2: the whole image tower") == 1
    assert "stage 1 ends: best rsum" in said
    assert run.is_complete and not run.state_path.exists()
    model = run.load_model()
    assert (model.text_adapter is not None) is (recipe == "best-adapter")


def test_the_adapter_is_saved_and_applied_to_texts(
    tables: Tables, best: Config, tmp_path: Path
) -> None:
    run = fit(*tables, out=tmp_path / "run", config=best.replace(recipe="best-adapter"))
    model = run.load_model()
    adapter, saved = model.text_adapter, weights(run)
    assert adapter is not None
    weight, bias = saved["text_adapter.linear.weight"], saved["text_adapter.linear.bias"]
    assert not torch.equal(weight, torch.eye(16)) and torch.equal(adapter.linear.weight, weight)
    texts = ["a red square", "blue on white"]
    frozen = model.text_encoder.encode(texts)
    expected = torch.nn.functional.normalize(frozen @ weight.T + bias, dim=-1)
    torch.testing.assert_close(model.encode_text(texts), expected, atol=1e-6, rtol=1e-5)
    assert float((model.encode_text(texts) - frozen).abs().max()) > 1e-4


def test_stage_2_starts_from_the_best_weights_of_stage_1(
    tables: Tables, best: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([10.0, 30.0, 20.0, 5.0])
    validated: list[dict[str, torch.Tensor]] = []
    entered: list[list[dict[str, torch.Tensor]]] = []
    real, enter = loop_module.validate, loop_module.TrainingLoop._enter

    def state(model: Any) -> dict[str, torch.Tensor]:
        return {key: value.clone() for key, value in model.state_dict().items()}

    def validate(model: CLIPModel, *rest: Any) -> dict[str, Any]:
        validated.append(state(model))
        return {**real(model, *rest), "rsum": next(scores)}

    def note(self: Any, stage: Any) -> None:
        entered.append([state(self.model), state(self.kept)])
        enter(self, stage)

    monkeypatch.setattr(loop_module, "validate", validate)
    monkeypatch.setattr(loop_module.TrainingLoop, "_enter", note)
    config = best.replace(head_epochs=3, num_epochs=1)
    run = fit(*tables, out=tmp_path / "run", config=config)
    for started in entered[1]:
        for key, value in validated[1].items():
            if key != "logit_scale":  # written when it is saved
                assert torch.equal(started[key], value), key
    kept = weights(run)  # stage 2 was worse
    assert all(torch.equal(kept[k], v) for k, v in validated[1].items() if k != "logit_scale")
    assert any(not torch.equal(validated[1][key], validated[2][key]) for key in validated[1])


def test_a_frozen_backbone_stays_the_pretrained_one_bit_for_bit(
    tables: Tables, best: Config, tmp_path: Path
) -> None:
    config = best.replace(freeze_backbone=True, text_adapter=True, freeze_batch_norm=False)
    pretrained = CLIPModel.from_config(config).state_dict()
    run = fit(*tables, out=tmp_path / "run", config=config)
    assert [row["stage"] for row in run.history()] == [1, 1] and run.is_complete
    trained = weights(run)
    backbone = [key for key in trained if key.startswith("image_encoder.")]
    assert len(backbone) > 10
    assert all(torch.equal(trained[key], pretrained[key]) for key in backbone)
    assert not torch.equal(trained["head.hidden.weight"], pretrained["head.hidden.weight"])


def test_batch_norm_keeps_its_statistics_and_trains_its_weights(
    tables: Tables, best: Config, tmp_path: Path
) -> None:
    """Looked at in an epoch of stage 2: the best weights may be those of stage 1, which moves
    nothing of the backbone."""
    before = CLIPModel.from_config(best).state_dict()
    config = best.replace(ema_decay=0.0, keep_epochs=True)
    runs = {
        freeze: fit(
            *tables, out=tmp_path / str(freeze), config=config.replace(freeze_batch_norm=freeze)
        )
        for freeze in (True, False)
    }
    frozen, moved = (load_file(checkpoint_weights(runs[k], "epoch-4")) for k in (True, False))
    statistics = [k for k in before if k.startswith("image_encoder.") and "running_" in k]
    layers = sorted({key.rpartition(".")[0] for key in statistics})
    assert layers
    assert all(torch.equal(before[key], frozen[key]) for key in statistics)
    assert not any(torch.equal(before[key], moved[key]) for key in statistics)
    for after in (frozen, moved):
        assert not any(torch.equal(before[f"{n}.weight"], after[f"{n}.weight"]) for n in layers)


def test_the_same_seed_gives_the_same_numbers_from_a_cold_and_a_warm_cache(
    tables: Tables, best: Config, tmp_path: Path
) -> None:
    cold = fit(*tables, out=tmp_path / "cold", config=best)
    warm = fit(*tables, out=tmp_path / "warm", config=best)
    other = fit(*tables, out=tmp_path / "other", config=best.replace(seed=1))
    assert same_weights(cold, warm) and timeless(cold) == timeless(warm)
    assert not same_weights(cold, other)


@pytest.mark.parametrize(
    ("stop_at", "changes"),
    [
        (1, {}),
        (4, {}),
        (6, {"text_adapter": True}),  # the last step of stage 1, not validated yet
        (7, {}),
        (8, {"unfreeze_epochs": 2}),
        (10, {"loss": "siglip"}),
        (11, {"image_queue": 16, "head_mixup": 0.0, "mixup": 0.0, "hard_negatives": 0.3}),
        (11, {"mixup": 0.5}),
        (11, {"mixup": 0.5, "mix_photos": True}),
        (11, {"ema_decay": 0.0, "head_epochs": 2}),
        (12, {}),
    ],
)
def test_resuming_anywhere_in_either_stage_changes_nothing(
    tables: Tables,
    best: Config,
    tmp_path: Path,
    ctrl_c_in_step: Callable[[int], None],
    stop_at: int,
    changes: dict[str, Any],
) -> None:
    config = best.replace(**changes)
    whole = fit(*tables, out=tmp_path / "whole", config=config)
    ctrl_c_in_step(stop_at)
    with pytest.raises(TrainingStopped):
        fit(*tables, out=tmp_path / "run", config=config)
    torch.manual_seed(99)  # whatever happened in between
    run = fit(*tables, out=tmp_path / "run", config=config, resume=True)
    assert same_weights(whole, run) and timeless(run) == timeless(whole)


class Killed(Exception):
    """A process that is gone."""


@pytest.mark.parametrize("epoch", [1, 2, 3])
@pytest.mark.parametrize("when", ["before the state", "after the state"])
def test_killed_at_the_end_of_an_epoch_also_that_between_the_stages(
    tables: Tables,
    best: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    epoch: int,
    when: str,
) -> None:
    """Each epoch is better than the one before, so that each overwrites the best weights."""
    real = loop_module.validate
    rsum = 0.0

    def rising(model: CLIPModel, *rest: Any) -> dict[str, Any]:
        nonlocal rsum
        rsum += 1.0
        return {**real(model, *rest), "rsum": rsum}

    monkeypatch.setattr(loop_module, "validate", rising)
    whole = fit(*tables, out=tmp_path / "whole", config=best)
    save = loop_module.save_state

    def kills(path: Path, parts: Any, progress: Any) -> None:
        due = progress.epoch == epoch and progress.step == 0
        if due and when == "before the state":
            raise Killed
        save(path, parts, progress)
        if due:
            raise Killed

    rsum = 0.0
    with monkeypatch.context() as patch:
        patch.setattr(loop_module, "save_state", kills)
        with pytest.raises(Killed):
            fit(*tables, out=tmp_path / "run", config=best)
    rsum = float(epoch - (when == "before the state"))
    run = fit(*tables, out=tmp_path / "run", config=best, resume=True)
    assert same_weights(whole, run) and timeless(run) == timeless(whole)


def test_each_stage_has_one_optimiser(
    tables: Tables, best: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two known to accelerate, fp16 gradients of the head would be unscaled twice."""
    known: list[int] = []
    real = loop_module.TrainingLoop._after_step

    def after_step(self: Any, meter: Any) -> None:
        known.append(len(self.accelerator._optimizers))
        assert self.accelerator._optimizers[0] is self.parts.optimizer
        real(self, meter)

    monkeypatch.setattr(loop_module.TrainingLoop, "_after_step", after_step)
    fit(*tables, out=tmp_path / "run", config=best)
    assert known == [1] * 12


def test_patience_ends_the_second_stage_and_the_run_is_complete(
    tables: Tables, best: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([50.0, 40.0, 30.0, 20.0, 10.0, 5.0])
    real = loop_module.validate

    def falling(model: CLIPModel, *rest: Any) -> dict[str, Any]:
        return {**real(model, *rest), "rsum": next(scores)}

    monkeypatch.setattr(loop_module, "validate", falling)
    config = best.replace(num_epochs=9, patience=2)
    run = fit(*tables, out=tmp_path / "run", config=config)
    assert [row["stage"] for row in run.history()] == [1, 1, 2, 2, 2]
    assert run.is_complete and not run.state_path.exists()
    assert fit(*tables, out=tmp_path / "run", config=config).is_complete  # trains no further


def test_a_learnt_temperature_is_saved_with_the_model(
    tables: Tables, best: Config, tmp_path: Path
) -> None:
    config = best.replace(learning_rate=1e-2, head_learning_rate=3e-2)
    run = fit(*tables, out=tmp_path / "run", config=config)
    row = max(run.history(), key=lambda row: row["rsum"])
    saved = 1 / float(run.load_model().logit_scale)
    assert saved == pytest.approx(row["temperature"], rel=1e-5) and abs(saved - 0.07) > 1e-4
    fixed = fit(*tables, out=tmp_path / "fixed", config=config.replace(learn_temperature=False))
    assert 1 / float(fixed.load_model().logit_scale) == pytest.approx(0.07)
    assert {row["temperature"] for row in fixed.history()} == {0.07}


def test_the_moving_average_is_what_is_validated_and_saved(
    tables: Tables, best: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    averages: list[MovingAverage] = []
    validated: list[CLIPModel] = []
    make, real = MovingAverage.__init__, loop_module.validate

    def note(self: MovingAverage, model: CLIPModel, *, decay: float) -> None:
        make(self, model, decay=decay)
        averages.append(self)

    def validate(model: CLIPModel, *rest: Any) -> dict[str, Any]:
        validated.append(model)
        return {**real(model, *rest), "rsum": float(len(validated))}

    monkeypatch.setattr(MovingAverage, "__init__", note)
    monkeypatch.setattr(loop_module, "validate", validate)
    model = CLIPModel.from_config(best)
    run = fit(*tables, out=tmp_path / "run", config=best, model=model)
    (average,) = averages
    assert all(one is average.model for one in validated) and len(validated) == 4
    kept, raw = weights(run), model.state_dict()
    assert all(torch.equal(kept[k], v) for k, v in average.model.state_dict().items())
    assert not torch.equal(kept["head.hidden.weight"], raw["head.hidden.weight"])
    fit(*tables, out=tmp_path / "none", config=best.replace(ema_decay=0.0))
    assert len(averages) == 1


def test_the_state_holds_of_the_average_what_differs_from_the_model(
    tables: Tables, best: Config, tmp_path: Path, ctrl_c_in_step: Callable[[int], None]
) -> None:
    ctrl_c_in_step(5)
    with pytest.raises(TrainingStopped) as stopped:
        fit(*tables, out=tmp_path / "run", config=best)
    with safe_open(stopped.value.run.state_path, framework="pt") as file:
        names = set(file.keys())
        head = [file.get_tensor(f"{room}.head.hidden.weight") for room in ("model", "average")]
    averaged = {n for n in names if n.startswith("average.")}  # in stage 1
    assert averaged == {n.replace("model.", "average.") for n in names if "model.head." in n}
    assert not torch.equal(*head) and "criterion.log_scale" in names


def test_the_features_are_standardised_by_those_of_the_training_images(
    tables: Tables, best: Config, tmp_path: Path
) -> None:
    best = best.replace(standardise_features=True)
    for out, config in {"two": best, "one": best.replace(head_epochs=0)}.items():
        model = CLIPModel.from_config(config)
        dataset = [tables[0].path(row) for row in range(24)]
        from captune.data.pixels import image_batches

        (pixels,) = image_batches(dataset, 32, 64)
        with torch.no_grad():
            features = model.eval().pooled_features(pixels)
        saved = weights(fit(*tables, out=tmp_path / out, config=config))
        torch.testing.assert_close(
            saved["head.feature_mean"], features.mean(0), atol=2e-3, rtol=2e-3
        )
        std = features.std(0, correction=0)
        wide = std > 0.1 * std.mean()
        torch.testing.assert_close(saved["head.feature_std"][wide], std[wide], atol=2e-3, rtol=1e-2)


def shuffled(table: CaptionTable, seed: int) -> CaptionTable:
    """The same photos and captions, each caption with a photo drawn at random."""
    owners = np.random.default_rng(seed).permutation(table.image_of_caption)
    column = table.captions.schema.get_field_index("image")
    captions = table.captions.set_column(column, "image", pa.array(owners))
    return CaptionTable(table.images, captions, table.name, table.split)


def known_score(image: torch.Tensor, text: torch.Tensor, owner: torch.Tensor) -> float:
    """The sum of the recalls whose chance is known, K in N. Image→text of more than one place
    depends on how near the captions of an image lie to each other."""
    found = retrieval_metrics(image, text, owner)
    to_image = found["text_to_image"]
    return float(found["image_to_text"]["R@1"] + sum(to_image[f"R@{k}"] for k in (1, 5, 10)))


def score_and_error(run: Run, checkpoint: str, table: CaptionTable) -> tuple[float, float]:
    """The known score of a checkpoint, and chance's standard error: that over images which are
    dealt to groups of captions at random, of these very embeddings with all their hubs."""
    model = run.load_model(weights=checkpoint_weights(run, checkpoint))
    image = model.encode_image([table.path(row) for row in range(len(table))], precision="fp32")
    text, owner = model.encode_text(table.texts()), torch.tensor(table.image_of_caption)
    rng = np.random.default_rng(0)
    deals = [torch.from_numpy(rng.permutation(len(table))) for _ in range(100)]
    dealt = [known_score(image, text, deal[owner]) for deal in deals]
    return known_score(image, text, owner), float(np.std(dealt))


def test_shuffled_captions_score_chance(best: Config, tmp_path: Path) -> None:
    """What is learnt comes from the pairs, and nothing of the answers leaks in another way.

    Training captions alone are shuffled: with those of the validation split shuffled as well, any
    model would score chance. The last epoch is judged, for the best is chosen by its score. All
    30 scenes stand in both splits, so that what true captions teach is seen within few epochs.
    """
    write_split(tmp_path / "scenes", "train", 60)
    write_split(tmp_path / "scenes", "val", 30, first=30)
    source = open_source(tmp_path / "scenes")
    train, val = source.table("train"), source.table("val")
    config = best.replace(
        head_epochs=10,
        num_epochs=10,
        keep_epochs=True,
        learning_rate=3e-3,
        ema_decay=0.0,
        patience=0,
        augment=False,  # so few weights have no chance to fit more than the photos themselves
        dropout=0.0,
        head_mixup=0.0,
        mixup=0.0,
    )

    def trained(name: str, table: CaptionTable, seed: int) -> tuple[float, float]:
        run = fit(table, val, out=tmp_path / name, config=config.replace(seed=seed))
        losses = [row["train_loss"] for row in run.history()]
        assert losses[-1] < losses[0]
        return score_and_error(run, "epoch-20", val)

    chance = 100 * (1 + 1 + 5 + 10) / 30
    learnt, error = trained("true", train, 0)
    assert learnt > chance + 8 * error, (learnt, error)
    wrong = [trained(f"shuffled-{seed}", shuffled(train, seed), seed) for seed in range(3)]
    found = np.mean([score for score, _ in wrong])
    error = math.sqrt(sum(each**2 for _, each in wrong)) / len(wrong)
    assert abs(found - chance) < 3 * error < (learnt - chance) / 5, (found, error, learnt)


def test_a_queue_of_images_does_not_keep_it_from_learning(
    tables: Tables, best: Config, tmp_path: Path
) -> None:
    """Told by recall: its loss rises when the queue comes in, after a stage's first epoch, and
    counts embeddings that are old."""
    calm = {"augment": False, "dropout": 0.0, "patience": 0, "learning_rate": 3e-3}
    queue = {"image_queue": 16, "head_mixup": 0.0, "mixup": 0.0}
    config = best.replace(head_epochs=15, num_epochs=15, **queue, **calm)
    history = fit(*tables, out=tmp_path / "run", config=config).history()
    assert all(math.isfinite(row["train_loss"]) for row in history)
    for first in (0, 15):
        warm_up, begun, last = (history[first + k]["train_loss"] for k in (0, 1, 14))
        assert warm_up < last < begun
    assert np.mean([row["rsum"] for row in history[-5:]]) > 420


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": "siglip", "temperature": 0.1},
        {"soft_targets": 0.2},
        {"hard_negatives": 0.5},
        {"duplicates": "positive", "duplicate_threshold": 0.98},
        {"captions_per_image": 2},
        {"generalised_pooling": True},
        {"use_attention_pooling": True},
        {"frozen_layers": 0.5, "unfreeze_epochs": 2},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_every_choice_learns(
    tables: Tables, best: Config, tmp_path: Path, changes: dict[str, Any]
) -> None:
    # Nothing but learning moves the loss.
    calm = {"augment": False, "dropout": 0.0, "head_mixup": 0.0, "mixup": 0.0, "patience": 0}
    config = best.replace(head_epochs=8, num_epochs=8, **calm, **changes)
    history = fit(*tables, out=tmp_path / "run", config=config).history()
    assert len(history) == 16
    for stage in (1, 2):
        losses = [row["train_loss"] for row in history if row["stage"] == stage]
        assert all(math.isfinite(loss) for loss in losses)
        # Hard negatives come in after the first epoch and make the loss another one.
        first = losses[1] if "hard_negatives" in changes else losses[0]
        assert losses[-1] < first, losses


def test_a_sigmoid_training_on_photos_that_tell_nothing_is_said_to_be_stuck(
    tables: Tables, best: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its loss starts at three times chance, for its bias does, and comes down to it."""
    for row in range(1, len(tables[0])):
        shutil.copy(tables[0].path(0), tables[0].path(row))
    values = {"loss": "siglip", "temperature": 0.1, "duplicate_threshold": 0.0, "patience": 0}
    long = {"head_epochs": 16, "head_learning_rate": 1e-2, "freeze_backbone": True}
    history = fit(*tables, out=tmp_path / "run", config=best.replace(**values, **long)).history()
    chance = Plan(CLIPModel.from_config(best), *tables, best.replace(**values)).stage_of(0)
    assert history[0]["train_loss"] > 3 * chance.chance_loss
    late = [row["train_loss"] for row in history[-5:]]
    assert np.mean(late) == pytest.approx(chance.chance_loss, rel=0.05)
    assert "no better than guessing" in capsys.readouterr().err


def test_a_loss_of_ones_own_is_left_as_it_is(
    tables: Tables, best: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    criterion = ContrastiveLoss(hard_negatives=0.7)
    seen: list[float] = []
    criterion.register_forward_pre_hook(lambda module, _: seen.append(module.hard_negatives))  # type: ignore[arg-type,return-value]
    model = CLIPModel.from_config(best)
    run = fit(*tables, out=tmp_path / "run", config=best, model=model, criterion=criterion)
    assert set(seen) == {0.7} and run.is_complete

    class Large(InfoNCELoss):
        """In units of its own."""

        def forward(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
            return 100 * super().forward(image, text)

    capsys.readouterr()
    fit(*tables, out=tmp_path / "large", config=best, criterion=Large())
    assert "guessing" not in capsys.readouterr().err


def test_fewer_images_than_a_batch_and_unreadable_ones(
    tables: Tables, best: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, val = tables
    train.path(4).write_bytes(b"broken")
    val.path(1).write_bytes(b"")
    config = best.replace(head_batch_size=256, batch_size=128)
    run = fit(train, val, out=tmp_path / "run", config=config)
    said = capsys.readouterr().err
    assert said.count("squares train: 24 images, 120 captions: 1 unreadable images left out") == 1
    assert [row["step"] for row in run.history()] == [1, 2, 3, 4]
    for row in run.history():
        assert row["unreadable_images"] == 1
        assert (row["images"], row["captions"]) == (7, 35)
