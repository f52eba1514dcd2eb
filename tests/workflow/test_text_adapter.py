"""Whatever a command does with texts, it does with the text adapter's output."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from captune.bank import CaptionBank
from captune.config import Config
from captune.data.labelled import open_labelled
from captune.data.table import CaptionTable
from captune.evaluation.hubness import hubness_corrected
from captune.evaluation.zeroshot import TEMPLATES
from captune.metrics import retrieval_metrics
from captune.models import CLIPModel
from captune.training.run import Run
from captune.workflow.blend import blend
from captune.workflow.evaluate import classify_files, evaluate, search
from captune.workflow.train import Outcome, train
from captune.workflow.zeroshot import zero_shot

WEIGHT, BIAS = "text_adapter.linear.weight", "text_adapter.linear.bias"
BEST, OTHER = "best_model.safetensors", "checkpoints/epoch-31.safetensors"


@pytest.fixture(scope="module")
def trained(outcome: Outcome, tiny_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of best-adapter on the data of ``outcome``; it is only copied."""
    folder = tmp_path_factory.mktemp("adapter")
    config = tiny_config.replace(recipe="best-adapter", head_epochs=2, precision="fp32")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CAPTUNE_CACHE", str(folder / "cache"))
        return train(outcome.run.provenance.data, config=config, out=folder / "run").run


@pytest.fixture
def adapted(trained: Run, tmp_path: Path) -> Path:
    """A copy whose adapter turns texts far away, and a checkpoint of it that turns them elsewhere:
    in so few steps an adapter stays next to the identity, which would hide that it is left out."""
    folder = Path(shutil.copytree(trained.folder, tmp_path / "adapted"))
    state = load_file(folder / BEST)
    for seed, name in enumerate((BEST, OTHER)):
        generator = torch.Generator().manual_seed(seed)
        random = torch.randn(16, 16, generator=generator)
        state[WEIGHT] = torch.linalg.qr(random).Q.contiguous()
        state[BIAS] = 0.2 * torch.randn(16, generator=generator)
        save_file(state, folder / name)
    return folder


def through_adapter(frozen: Tensor, *files: Path) -> Tensor:
    """By hand, with the mean of the adapters in files of weights."""
    states = [load_file(file) for file in files]
    weight, bias = (torch.stack([s[key] for s in states]).mean(0) for key in (WEIGHT, BIAS))
    return F.normalize(frozen @ weight.T + bias, dim=-1)


def embedded(model: CLIPModel, table: CaptionTable) -> tuple[Tensor, Tensor, Tensor]:
    """Images, captions as the frozen tower gives them, and whose they are."""
    images = model.encode_image([table.path(row) for row in range(len(table))], precision="fp32")
    frozen = CaptionBank.build(table.texts(), model.text_encoder, precision="fp32").all()
    return images, frozen, torch.tensor(table.image_of_caption)


def test_search_compares_images_with_the_adapters_output(adapted: Path) -> None:
    run = Run.open(adapted)
    model, table = run.load_model(), run.source().table("val")
    images = embedded(model, table)[0]
    frozen = model.text_encoder.encode(["a red square"])

    def best(text: Tensor) -> tuple[list[str], list[float]]:
        found = (images @ text[0]).sort(descending=True)
        return [str(table.path(row)) for row in found.indices.tolist()], found.values.tolist()

    hits = search(str(adapted), "a red square", k=8)
    order, scores = best(through_adapter(frozen, adapted / BEST))
    assert [hit.image for hit in hits] == order
    assert [hit.score for hit in hits] == pytest.approx(scores, abs=1e-5)
    bare_order, bare_scores = best(frozen)
    assert order != bare_order and abs(scores[0] - bare_scores[0]) > 0.05


def test_labels_are_compared_through_the_adapter(adapted: Path, colours: Path) -> None:
    """Of files that are named, and of a labelled set; the mean over prompts comes after it."""
    model = Run.open(adapted).load_model()
    labelled = open_labelled(colours)
    names, files = labelled.names, [str(labelled.table.path(row)) for row in range(12)]
    images = embedded(model, labelled.table)[0]
    target = torch.tensor(labelled.target)
    prompts = [template.replace("{}", name) for name in names for template in TEMPLATES]
    frozen = model.text_encoder.encode(prompts)

    def logits(text: Tensor) -> Tensor:
        classes = F.normalize(text.view(len(names), len(TEMPLATES), -1).mean(1), dim=-1)
        return model.logit_scale * images @ classes.T

    expected, bare = logits(through_adapter(frozen, adapted / BEST)), logits(frozen)
    found = torch.tensor(
        [list(p.probabilities.values()) for p in classify_files(str(adapted), files, names)]
    )
    torch.testing.assert_close(found, expected.softmax(1), atol=5e-3, rtol=0)  # perhaps in bf16
    assert (expected.softmax(1) - bare.softmax(1)).abs().max() > 0.05

    figures = zero_shot(str(adapted), str(colours), probe=False).metrics
    assert figures["zero_shot"]["top1"] == pytest.approx(
        100 * float((expected.argmax(1) == target).float().mean())
    )
    surprise = float(F.cross_entropy(expected, target))
    assert figures["calibration"]["before"]["nll"] == pytest.approx(surprise, rel=1e-4)
    assert abs(surprise - float(F.cross_entropy(bare, target))) > 0.05


def test_recall_and_hubness_are_of_the_adapters_output_on_both_sides(adapted: Path) -> None:
    """The evaluated captions, and those of the training that show which images are hubs."""
    run = Run.open(adapted)
    model = run.load_model()
    images, frozen, owner = embedded(model, run.source().table("val"))
    querybank = embedded(model, run.source().table("train"))[1]
    text, queries = (through_adapter(each, adapted / BEST) for each in (frozen, querybank))

    found = evaluate(str(adapted), hubness=True)
    plain = retrieval_metrics(images, text, owner)
    assert found["rsum"] == pytest.approx(plain["rsum"])
    assert found["rsum"] != pytest.approx(retrieval_metrics(images, frozen, owner)["rsum"])
    corrected = hubness_corrected(images, text, owner, queries)
    assert found["hubness_corrected"] == {**corrected, "queries_left_out": 0}
    for wrong in ((frozen, queries), (text, querybank)):
        assert hubness_corrected(images, wrong[0], owner, wrong[1]) != corrected


def test_a_blend_has_the_adapter_between_those_of_its_ends(adapted: Path, tmp_path: Path) -> None:
    """The two differ in their adapters alone, so nothing else moves the figures."""
    run = Run.open(adapted)
    files = [adapted / OTHER, adapted / BEST]
    assert [k for k, v in load_file(files[0]).items() if not v.equal(load_file(files[1])[k])] == [
        BIAS,
        WEIGHT,
    ]
    images, frozen, owner = embedded(run.load_model(), run.source().table("train"))
    texts = [through_adapter(frozen, *which) for which in (files[:1], files, files[1:])]
    expected = [retrieval_metrics(images, text, owner)["rsum"] for text in texts]
    bare = retrieval_metrics(images, frozen, owner)["rsum"]
    assert np.unique([*expected, bare]).size == 4

    folder = tmp_path / "blend"
    told = blend(f"{adapted}@epoch-31", str(adapted), split="train", steps=3, out=folder).told
    assert [row["rsum"] for row in told["rows"]] == pytest.approx(expected)
    assert evaluate(str(folder), split="train")["rsum"] == pytest.approx(max(expected))
