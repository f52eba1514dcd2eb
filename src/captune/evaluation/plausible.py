"""Matches that the original captions do not list, on the Karpathy test split of COCO.

A caption of COCO often describes other images as well, and the plain figures call these wrong.
Three sets of ground truth, kept by the package ``eccv_caption``, say which. For Crisscrossed
Captions (CxC, Parekh et al. 2021) people judged pairs, and a few of the original ones fell out. For
ECCV Caption (Chun et al. 2022) machines proposed and people confirmed; only some of the images and
captions are queries. PMRP (Chun et al. 2021) takes a pair as plausible where both images hold
nearly the same kinds of objects; its ground truth is a download of its own. The figures are the
package's; the ranked lists are made here.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.nn import functional as F

from captune.data.coco import karpathy_ids
from captune.errors import CaptuneError, MissingExtraError
from captune.evaluation.hubness import rows_per_block, similarity_rows
from captune.evaluation.protocols import COCO_5K, FULL, TIE_RULE, Protocol
from captune.metrics import RECALL_AT

PMRP_FILES = ("pm_image_to_caption.json", "pm_caption_to_image.json")
PMRP_HOME = "https://github.com/naver-ai/eccv-caption"
DIRECTIONS = {"i2t": "image_to_text", "t2i": "text_to_image"}
ECCV_METRICS = {"eccv_map_at_r": "mAP@R", "eccv_rprecision": "R-Precision", "eccv_r1": "R@1"}

Ids = npt.NDArray[np.int64]
Matches = Mapping[int, Collection[int]]
"""What answers each query: the ids of captions by the id of an image, or the other way."""


@dataclass(frozen=True)
class GroundTruth:
    """``eccv_caption``'s object with the matches of CxC, of ECCV Caption and perhaps of PMRP."""

    package: Any

    @classmethod
    def load(cls, pmrp: str | Path | None = None) -> GroundTruth:
        """What the package brings, and PMRP's where its folder is named.

        Raises:
            CaptuneError: the package is not installed; a file of the folder is missing or wrong.
        """
        try:
            with warnings.catch_warnings():
                # It recommends a faster JSON parser to whoever imports it.
                warnings.simplefilter("ignore", UserWarning)
                from eccv_caption import Metrics
        except ImportError:
            raise MissingExtraError("--eccv", "eccv-caption", "eccv") from None
        truth = cls(Metrics())
        if pmrp is not None:
            truth._read_pmrp(Path(pmrp).expanduser())
        return truth

    def _read_pmrp(self, folder: Path) -> None:
        needed = f"PMRP needs {' and '.join(PMRP_FILES)}, see {PMRP_HOME}"
        missing = [name for name in PMRP_FILES if not (folder / name).is_file()]
        if missing:
            raise CaptuneError(f"{folder} holds no {' and no '.join(missing)}: {needed}")
        try:
            self.package.set_pm_gts(*(str(folder / name) for name in PMRP_FILES))
        # What its parser raises of a file that is no JSON, or none of lists of numbers by number.
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise CaptuneError(
                f"the ground truth in {folder} cannot be read ({error}): {needed}"
            ) from None
        ids = karpathy_ids()
        queries = {"i2t": ids["test"], "t2i": ids["test_captions"]}
        for name, (direction, matches) in zip(PMRP_FILES, self.package.pm_gts.items(), strict=True):
            strange = set(matches) - set(queries[direction].tolist())
            empty = [query for query, found in matches.items() if not found]
            if strange or empty or not matches:
                found = f"query {min(strange)}" if strange else "a query without a match"
                raise CaptuneError(
                    f"{folder / name} is no ground truth of {COCO_5K.split}, it holds "
                    f"{found if matches else 'nothing'}: {needed}"
                )

    def check(self, image_ids: Ids, caption_ids: Ids) -> None:
        """Refuse anything but the images ``(N,)`` and captions ``(M,)`` that it is about.

        Raises:
            CaptuneError: some are others, or missing.
        """
        ids = karpathy_ids()
        for found, key in ((image_ids, "test"), (caption_ids, "test_captions")):
            if not np.array_equal(np.sort(found), np.sort(ids[key])):
                raise CaptuneError(
                    "--eccv and --pmrp are defined on the 5,000 images and 25,000 captions of "
                    f"{COCO_5K.split}, and by their ids these {len(image_ids):,} images and "
                    f"{len(caption_ids):,} captions are others: name a COCO 2014 folder"
                )


def split_of_truth(split: str | None, protocol: Protocol) -> str:
    """The split that all ground truth is of.

    Raises:
        CaptuneError: another is named, or a protocol of other galleries.
    """
    if protocol not in (FULL, COCO_5K):
        raise CaptuneError(
            f"--eccv and --pmrp rank the whole split, which is protocol {COCO_5K.name}: leave out "
            f"--protocol {protocol.name}, or them"
        )
    if split not in (None, COCO_5K.split):
        raise CaptuneError(
            f"--eccv and --pmrp are defined on {COCO_5K.split} alone, found --split {split}: leave "
            "out --split, or them"
        )
    return COCO_5K.split


def plausible_matches(
    image: Tensor, text: Tensor, image_ids: Ids, caption_ids: Ids, truth: GroundTruth
) -> dict[str, Any]:
    """The figures of CxC, ECCV Caption and PMRP, in percent.

    ``R@K``: a match is among the first K (any hit). ``R-Precision``: of a query with R matches, the
    share of them among the first R. ``mAP@R``: :func:`captune.metrics.average_precision_at_r`, of
    all matches. Galleries are the whole split; means are over the queries of a ground truth. Among
    equal scores its matches come last.

    Args:
        image: ``(N, D)`` unit length.
        text: ``(M, D)`` unit length.
        image_ids: ``(N,)`` COCO's image ids.
        caption_ids: ``(M,)`` COCO's annotation ids.
        truth: from :meth:`GroundTruth.load`.

    Returns:
        ``cxc``, ``eccv`` and, where there is ground truth, ``pmrp``: in each ``image_to_text`` and
        ``text_to_image`` with their figures and ``queries``. Also ``ties`` and ``package``.

    Raises:
        CaptuneError: not all of the Karpathy test split, or more than it.
    """
    truth.check(image_ids, caption_ids)
    package = truth.package

    def lists(matches: Mapping[str, Matches]) -> dict[str, dict[int, Ids]]:
        return {
            "i2t": ranked_lists(image, text, image_ids, caption_ids, matches["i2t"]),
            "t2i": ranked_lists(text, image, caption_ids, image_ids, matches["t2i"]),
        }

    cxc, eccv = lists(package.cxc_gts), lists(package.eccv_gts)
    recalls = {f"R@{k}": package.cxc_recalls(cxc, "all", K=k) for k in RECALL_AT}
    # eccv_metrics draws a progress bar whatever its `verbose` says.
    with contextlib.redirect_stderr(io.StringIO()):
        of_eccv = package.eccv_metrics(eccv, "all")
    precisions = {name: of_eccv[key] for key, name in ECCV_METRICS.items()}
    found = {
        "cxc": _by_direction(recalls, package.cxc_gts),
        "eccv": _by_direction(precisions, package.eccv_gts),
    }
    if package.pm_gts:
        plausible = {"R-Precision": package.pmrp(lists(package.pm_gts), "all")}
        found["pmrp"] = _by_direction(plausible, package.pm_gts)
    return {**found, "ties": TIE_RULE, "package": f"eccv_caption {version('eccv-caption')}"}


def _by_direction(
    fractions: Mapping[str, Mapping[str, float]], truth: Mapping[str, Matches]
) -> dict[str, dict[str, float]]:
    """The package's fractions, figure by figure, to percent, direction by direction."""
    return {
        name: {
            **{figure: 100 * float(both[key]) for figure, both in fractions.items()},
            "queries": len(truth[key]),
        }
        for key, name in DIRECTIONS.items()
    }


def ranked_lists(
    query: Tensor, gallery: Tensor, query_ids: Ids, gallery_ids: Ids, matches: Matches
) -> dict[int, Ids]:
    """What each query finds first, best first, matches last among equals.

    Args:
        query: ``(Q, D)``.
        gallery: ``(G, D)``.
        query_ids: ``(Q,)`` unique.
        gallery_ids: ``(G,)`` unique.
        matches: queries that are not in it are left out.

    Returns:
        By query id the gallery's ids: as many as the query has matches, but at least ten, so that
        every figure can be told, and at most G.
    """
    rows = np.flatnonzero(np.isin(query_ids, list(matches)))
    # A product's last few columns may sum in another order; beyond the gallery they harm no tie.
    similarity = similarity_rows(query[rows], F.pad(gallery, (0, 0, 0, -len(gallery) % 16)))
    block = rows_per_block(len(gallery))
    found = {}
    for start in range(0, len(rows), block):
        scores = similarity(start, start + block)[:, : len(gallery)].numpy()  # (b, G)
        for row, of_query in zip(rows[start : start + block], scores, strict=True):
            own = np.asarray(list(matches[int(query_ids[row])]))
            length = min(max(RECALL_AT[-1], len(own)), len(gallery))
            found[int(query_ids[row])] = _first(of_query, gallery_ids, own, length)
    return found


def _first(scores: npt.NDArray[np.float32], ids: Ids, matches: Ids, length: int) -> Ids:
    """The ``length`` best of ``ids (G,)`` by ``scores (G,)``, matches last among equals."""
    least = np.partition(scores, -length)[-length]
    kept = np.flatnonzero(scores >= least)  # more than `length` where several tie with the last
    late = np.isin(ids[kept], matches)
    return ids[kept[np.lexsort((late, -scores[kept]))[:length]]]
