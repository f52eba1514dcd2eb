"""The caption bank against a plain loop: python benchmarks/bank.py DATA [--captions N].

Captions are the first N of DATA, in file order: a data folder or table (its train split), or a JSON
file with COCO's `annotations`. The plain loop embeds them in batches of 64, in file order, in fp32;
the bank is built as training builds it, on an empty cache, with the packaged text tower. Ways take
turns; a ratio is of two turns of one repeat.

Writes benchmarks/results/bank.json and prints it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from record import heading, in_turns, keep, summary
from torch import Tensor
from torch.nn import functional as F

from captune import open_source
from captune.bank import CaptionBank
from captune.device import best_device
from captune.encoders.text import PACKAGED, TextEncoder, load_text_encoder

PLAIN_BATCH = 64


def captions_of(data: Path) -> list[str]:
    """All captions of a file of annotations, or of a data set's train split."""
    if data.suffix == ".json":
        listed = json.loads(data.read_text(encoding="utf-8"))["annotations"]
        return [str(one["caption"]) for one in listed]
    return open_source(data).table("train").texts()


def plain(texts: list[str], encoder: TextEncoder) -> Tensor:
    """``(M, D)``, one batch after the other."""
    starts = range(0, len(texts), PLAIN_BATCH)
    return torch.cat([encoder.encode(texts[start : start + PLAIN_BATCH]) for start in starts])


def banked(texts: list[str], encoder: TextEncoder) -> Tensor:
    """``(M, D)`` of a bank built on an empty cache."""
    with tempfile.TemporaryDirectory() as cache:
        return CaptionBank.build(texts, encoder, cache=Path(cache), progress=False).all()


def measure(texts: list[str], encoder: TextEncoder, repeats: int) -> dict[str, Any]:
    """Both ways in turns, and how far the bank's embeddings lie from the plain loop's."""
    few = texts[: 2 * PLAIN_BATCH]
    plain(few, encoder)  # libraries start
    found: dict[str, Tensor] = {}
    ways = {
        "plain loop": lambda: found.update(plain=plain(texts, encoder)),
        "bank": lambda: found.update(bank=banked(texts, encoder)),
    }
    taken = in_turns(ways, repeats)
    cosine = F.cosine_similarity(found["plain"], found["bank"], dim=-1)
    return {
        "text encoder": encoder.name,
        "captions": len(texts),
        "distinct": len(set(texts)),
        "ways": summary(taken),
        "mean cosine with the plain loop": round(float(cosine.mean()), 6),
        "least cosine with the plain loop": round(float(cosine.min()), 6),
    }


def main() -> None:
    """Measure, keep and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path, metavar="DATA")
    parser.add_argument("--captions", type=int, default=5000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--text-encoder", default=PACKAGED)
    parser.add_argument("--out", type=Path, default=None, help="folder of the result")
    arguments = parser.parse_args()
    texts = captions_of(arguments.data)[: arguments.captions]
    result = heading("sentence-transformers", "transformers", device=best_device())
    result |= measure(texts, load_text_encoder(arguments.text_encoder), arguments.repeats)
    keep("bank", result, arguments.out)


if __name__ == "__main__":
    main()
