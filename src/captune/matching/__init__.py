"""Which caption of a batch describes which of its images: ids and embeddings in, masks out."""

from captune.matching.block import Block
from captune.matching.duplicates import Likeness, near_duplicates
from captune.matching.pairs import DUPLICATES, Pairs, match_pairs, mix_pairs, one_to_one
from captune.matching.parts import PairsPart, match_part, whole

__all__ = [
    "DUPLICATES",
    "Block",
    "Likeness",
    "Pairs",
    "PairsPart",
    "match_pairs",
    "match_part",
    "mix_pairs",
    "near_duplicates",
    "one_to_one",
    "whole",
]
