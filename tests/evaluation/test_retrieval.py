"""Recall against a slow loop from the definition, and search against brute force."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from captune.bank import CaptionBank
from captune.data.sources import open_source
from captune.data.table import CaptionTable
from captune.errors import CaptuneError
from captune.evaluation.embeddings import ImageEmbeddings, embed_images
from captune.evaluation.retrieval import evaluate_retrieval, search_images
from captune.models import CLIPModel

DIMENSION = 6


class Frozen:
    """A model that gives the text tower's embeddings as they are, or through an adapter."""

    device = torch.device("cpu")

    def __init__(self, adapter: Callable[[Tensor], Tensor] = lambda text: text) -> None:
        self.project_text = adapter


NO_ADAPTER: Any = Frozen()


def uneven_table(images: int) -> CaptionTable:
    """One, two, three or four captions an image, those of one image not side by side."""
    owners = [image for turn in range(4) for image in range(images) if image % 4 >= turn]
    return CaptionTable.build(
        [(10 + i, f"{i}.jpg", Path(f"{i}.jpg")) for i in range(images)],
        [(place, f"caption {place}", owner) for place, owner in enumerate(owners)],
        name="made",
        split="val",
    )


def random_bank(captions: int, seed: int = 1) -> CaptionBank:
    """Vectors of any length: the bank's own lookup makes them unit."""
    rng = np.random.default_rng(seed)
    embeddings = rng.normal(size=(captions, DIMENSION)).astype(np.float16)
    return CaptionBank(embeddings, np.arange(captions, dtype=np.int64), "made")


def embeddings_of(rows: list[int], unreadable: int = 0, seed: int = 0) -> ImageEmbeddings:
    vectors = np.random.default_rng(seed).normal(size=(100, DIMENSION))[rows]
    unit = F.normalize(torch.from_numpy(vectors).float(), dim=-1)
    return ImageEmbeddings(np.array(rows, dtype=np.int64), unit, unreadable)


def recalls(ranks: list[int]) -> dict[str, float]:
    percent = {f"R@{k}": 100 * sum(rank <= k for rank in ranks) / len(ranks) for k in (1, 5, 10)}
    return {
        **percent,
        "median_rank": float(statistics.median(ranks)),
        "mean_rank": sum(ranks) / len(ranks),
        "MRR": 100 * sum(1 / rank for rank in ranks) / len(ranks),
    }


def average_precision(ordered: list[bool]) -> float:
    """Of hits and misses in order, over as many places as there are hits (AP@R)."""
    first = ordered[: sum(ordered)]
    return sum(sum(first[: k + 1]) / (k + 1) for k, hit in enumerate(first) if hit) / sum(ordered)


def slow_metrics(
    table: CaptionTable, images: dict[int, list[float]], texts: list[list[float]]
) -> dict[str, dict[str, float]]:
    """The definition, one similarity at a time, over the images that were read."""
    owner = table.image_of_caption.tolist()
    captions = [caption for caption in range(len(owner)) if owner[caption] in images]

    def similarity(image: int, caption: int) -> float:
        return sum(a * b for a, b in zip(images[image], texts[caption], strict=True))

    image_ranks, caption_ranks, precisions = [], [], []
    for image in images:
        ordered = sorted(captions, key=lambda caption: -similarity(image, caption))
        image_ranks.append(1 + min(ordered.index(c) for c in captions if owner[c] == image))
        precisions.append(average_precision([owner[c] == image for c in ordered]))
    for caption in captions:
        found = sorted(images, key=lambda image: -similarity(image, caption))
        caption_ranks.append(1 + found.index(owner[caption]))
    found_first = recalls(caption_ranks)
    mean = 100 * sum(precisions) / len(precisions)
    return {
        "image_to_text": {**recalls(image_ranks), "mAP@R": mean},
        "text_to_image": {**found_first, "mAP@R": found_first["R@1"]},
    }


@pytest.mark.parametrize("rows", [list(range(23)), [7, 0, 22, 3, 11, 2, 19, 5]])
def test_metrics_equal_a_slow_loop_from_the_definition(rows: list[int]) -> None:
    """Also where some images could not be read, and the others are in any order."""
    table = uneven_table(23)
    bank = random_bank(table.captions.num_rows)
    embeddings = embeddings_of(rows, unreadable=23 - len(rows))
    found = evaluate_retrieval(NO_ADAPTER, table, embeddings, bank).metrics
    texts = [(row / np.linalg.norm(row)).tolist() for row in bank.embeddings.astype(np.float64)]
    vectors = dict(zip(rows, embeddings.vectors.double().tolist(), strict=True))
    expected = slow_metrics(table, vectors, texts)
    for direction, values in expected.items():
        assert found[direction] == pytest.approx(values)
    six = [expected[d][f"R@{k}"] for d in expected for k in (1, 5, 10)]
    assert found["rsum"] == pytest.approx(sum(six))
    # A loop that finds nothing, or everything, would agree with almost anything.
    assert 0 < sum(six) < 600


def test_captions_of_unreadable_images_are_left_out_and_the_images_counted() -> None:
    table = uneven_table(8)
    found = evaluate_retrieval(
        NO_ADAPTER,
        table,
        embeddings_of([0, 1, 2, 4, 5, 6], 2),
        random_bank(table.captions.num_rows),
    ).metrics
    # Images 3 and 7 have four captions each, of 1 + 2 + 3 + 4 twice.
    assert (found["images"], found["captions"], found["unreadable_images"]) == (6, 12, 2)


def test_the_result_names_its_data_and_the_very_captions_it_is_of() -> None:
    table = uneven_table(8)
    found = evaluate_retrieval(
        NO_ADAPTER, table, embeddings_of(list(range(8))), random_bank(table.captions.num_rows)
    ).metrics
    assert (found["data"], found["split"]) == ("made", "val")
    assert found["split_digest"] == uneven_table(8).digest != uneven_table(9).digest


def test_captions_are_compared_through_the_models_text_adapter() -> None:
    table = uneven_table(8)
    bank = random_bank(table.captions.num_rows)
    generator = torch.Generator().manual_seed(3)
    turned = torch.linalg.qr(torch.randn(bank.dimension, bank.dimension, generator=generator)).Q
    embeddings = embeddings_of(list(range(8)))
    adapted: Any = Frozen(lambda text: text @ turned)
    by_hand = CaptionBank(
        (bank.embeddings.astype(np.float32) @ turned.numpy()).astype(np.float16),
        bank.row_of_caption,
        "turned",
    )
    found = evaluate_retrieval(adapted, table, embeddings, bank).metrics
    assert found == evaluate_retrieval(NO_ADAPTER, table, embeddings, by_hand).metrics
    assert found != evaluate_retrieval(NO_ADAPTER, table, embeddings, bank).metrics


class FixedText:
    """A model whose texts lie where the test puts them."""

    def __init__(self, vectors: dict[str, Tensor]) -> None:
        self.vectors = vectors

    def encode_text(self, texts: list[str]) -> Tensor:
        return torch.stack([self.vectors[text] for text in texts])


def test_search_order_equals_brute_force_for_every_query() -> None:
    table = uneven_table(20)
    embeddings = embeddings_of([19, 4, 7, 0, 12, 3, 16])
    directions = F.normalize(torch.randn(3, DIMENSION, generator=torch.Generator().manual_seed(5)))
    queries = ["first", "second", "third"]
    model = FixedText(dict(zip(queries, directions, strict=True)))
    answers = search_images(model, table, embeddings, queries, k=4)  # type: ignore[arg-type]
    for direction, hits in zip(directions.tolist(), answers, strict=True):
        scores = {
            f"{row}.jpg": sum(a * b for a, b in zip(direction, vector, strict=True))
            for row, vector in zip(embeddings.rows, embeddings.vectors.tolist(), strict=True)
        }
        best = sorted(scores, key=lambda name: -scores[name])[:4]
        assert [hit.image for hit in hits] == best
        assert [hit.score for hit in hits] == pytest.approx([scores[n] for n in best], abs=1e-6)


def test_a_hit_carries_the_first_caption_of_its_own_image() -> None:
    table = uneven_table(5)
    embeddings = embeddings_of([4, 2, 3])
    model = FixedText({"that one": embeddings.vectors[1]})
    hit = search_images(model, table, embeddings, ["that one"], k=1)[0][0]  # type: ignore[arg-type]
    assert (hit.image, hit.caption) == ("2.jpg", "caption 2")
    assert hit.score == pytest.approx(1, abs=1e-6)


def test_a_real_model_ranks_images_by_their_cosine_with_the_text(
    tiny_clip: Path, coco: Path
) -> None:
    model = CLIPModel.zero_shot(str(tiny_clip))
    table = open_source(coco).table("val")
    embeddings = embed_images(model, table, precision="fp32")
    hits = search_images(model, table, embeddings, ["a dog"], k=8)[0]
    text = model.encode_text("a dog")[0].tolist()
    for hit in hits:
        image = model.encode_image(hit.image, precision="fp32")[0].tolist()
        cosine = sum(a * b for a, b in zip(text, image, strict=True))
        assert hit.score == pytest.approx(cosine, abs=1e-5)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_asking_for_more_pictures_than_there_are_gives_all_of_them_once() -> None:
    table, embeddings = uneven_table(5), embeddings_of([1, 3, 4])
    model = FixedText({"any": embeddings.vectors[0]})
    hits = search_images(model, table, embeddings, ["any"], k=50)[0]  # type: ignore[arg-type]
    assert sorted(hit.image for hit in hits) == ["1.jpg", "3.jpg", "4.jpg"]


@pytest.mark.parametrize("k", [0, -3])
def test_fewer_than_one_picture_is_refused(k: int) -> None:
    table, embeddings = uneven_table(5), embeddings_of([1, 3, 4])
    with pytest.raises(CaptuneError, match=f"k={k}"):
        search_images(FixedText({}), table, embeddings, ["any"], k=k)  # type: ignore[arg-type]


@pytest.mark.parametrize("query", ["", " \n"])
def test_an_empty_query_is_refused(query: str) -> None:
    table, embeddings = uneven_table(5), embeddings_of([1, 3, 4])
    with pytest.raises(CaptuneError, match="empty query"):
        search_images(FixedText({}), table, embeddings, ["a", query])  # type: ignore[arg-type]
