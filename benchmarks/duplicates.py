"""From which cosine captions of two images say the same: benchmarks/duplicates.py DATA [TOWERS].

For each threshold: how many captions of other images a caption meets from there on in a step of
stage 1, how many captions have one anywhere in the training split, and, beside them, how many pairs
of captions of one image are as alike. All over a seeded sample of captions against all of them.

With --pairs N it prints N pairs of two images from each band of cosines, to be judged by reading:
does the one caption describe a picture for which the other was written? docs/recipe.md has what
came of it. Writes benchmarks/results/duplicates.json.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from typing import Any

import torch
from record import heading, keep
from torch import Tensor

from captune import CaptionBank, Config, open_source
from captune.data.table import CaptionTable
from captune.encoders.text import load_named_text_encoder

EDGES = (0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.01)
SAMPLE = 2000


def cosines_of(
    table: CaptionTable, text: Tensor, sample: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """A sample of captions ``(S,)``, their cosines with all ``(S, C)``, and where both captions
    are of one image; a caption with itself is 0."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(text), generator=generator)[:sample]
    cosine = text[rows] @ text.T
    cosine[torch.arange(len(rows)), rows] = 0
    owners = torch.as_tensor(table.image_of_caption)
    return rows, cosine, owners[rows][:, None] == owners


def counted(cosine: Tensor, same: Tensor, met: int) -> list[dict[str, Any]]:
    """One row a threshold; a caption meets ``met`` others in a step."""
    others = cosine.masked_fill(same, 0.0)
    pairs = same.sum() - len(same)  # without each caption with itself
    return [
        {
            "threshold": edge,
            "met in a step": round(float((others >= edge).float().mean()) * met, 4),
            "captions with one, %": round(100 * float((others >= edge).any(1).float().mean()), 2),
            "pairs of one image, %": round(
                100 * float((cosine.masked_fill(~same, 0.0) >= edge).sum() / pairs), 2
            ),
        }
        for edge in EDGES[:-1]
    ]


def drawn(cosine: Tensor, same: Tensor, number: int, seed: int) -> dict[str, list[list[int]]]:
    """``number`` pairs of two images from each band, places in ``cosine``."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for low, high in pairwise(EDGES):
        places = ((cosine >= low) & (cosine < high) & ~same).nonzero()
        chosen = torch.randperm(len(places), generator=generator)[:number]
        found[f"{low} to {min(high, 1.0)}"] = places[chosen].tolist()
    return found


def main() -> None:
    """Count, keep, and print pairs where they are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("towers", nargs="?", default="minilm-lite0")
    parser.add_argument("--pairs", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    config = Config.from_mapping({"towers": arguments.towers})
    table = open_source(arguments.data).table("train")
    encoder = load_named_text_encoder(config.text_encoder_name)
    texts = table.texts()
    text = CaptionBank.build(texts, encoder, precision=config.precision).all()
    rows, cosine, same = cosines_of(table, text, SAMPLE, arguments.seed)
    each = len(texts) / len(table)
    met = round(config.head_batch_size * each) + config.bank_negatives
    result = {
        **heading(),
        "split": table.describe(),
        "text encoder": config.text_encoder_name,
        "sample": len(rows),
        "seed": arguments.seed,
        "captions of a step": met,
        "rows": counted(cosine, same, met),
    }
    keep("duplicates", result)
    for band, pairs in drawn(cosine, same, arguments.pairs, arguments.seed).items():
        for query, other in pairs:
            print(f"{band}: {texts[int(rows[query])]} | {texts[other]}")


if __name__ == "__main__":
    main()
