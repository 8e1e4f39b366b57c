"""How two rows of logits differ. Plain numpy; knows nothing of models."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, log10
from typing import Any

import numpy as np
from numpy.typing import NDArray

from motrt.export.parity.tolerances import STABLE_MARGIN, TOP_K

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class RowDifference:
    """One row of logits against the reference's, both cut to the predicted modality's range.

    Attributes:
        max_abs: largest difference.
        mean_abs: mean difference.
        mean_square: mean of the squared differences.
        relative_l2: |came - expected| / |expected|; the gate.
        cosine: of the two rows.
        kl: Kullback-Leibler divergence of the softmaxes, expected from came, in nats.
        margin: by how much the reference's best logit leads its second.
        same_top_1: whether the best ids agree.
        top_k_overlap: share of the reference's k best ids among the others' k best.
    """

    max_abs: float
    mean_abs: float
    mean_square: float
    relative_l2: float
    cosine: float
    kl: float
    margin: float
    same_top_1: bool
    top_k_overlap: float

    @property
    def sqnr_db(self) -> float:
        """Signal to quantisation noise, 20 log10(|expected| / |came - expected|), in decibel."""
        return inf if self.relative_l2 == 0 else -20.0 * log10(self.relative_l2) if self.relative_l2 < inf else -inf

    @property
    def is_stable(self) -> bool:
        """Whether the reference is sure of its best id, by a margin that published gates ask for."""
        return self.margin > STABLE_MARGIN


def compare_rows(expected: Floats, came: Floats) -> RowDifference:
    """Every measure of one row. Where either row holds NaN or infinity they differ infinitely.

    Both sides are looked at: NaN compares false with everything, and a worst value found by ``max`` may pass it by.
    """
    wanted, got = expected.astype(np.float64), came.astype(np.float64)
    if not (np.isfinite(wanted).all() and np.isfinite(got).all()):
        worst = float("inf")
        return RowDifference(worst, worst, worst, worst, 0.0, worst, worst, False, 0.0)
    order = _largest(wanted, 2)
    margin = float(wanted[order[0]] - wanted[order[1]]) if len(wanted) > 1 else float("inf")
    difference = got - wanted
    norm, other = float(np.linalg.norm(wanted)), float(np.linalg.norm(got))
    k = min(TOP_K, len(wanted))
    overlap = len({*_largest(wanted, k).tolist()} & {*_largest(got, k).tolist()}) / k
    return RowDifference(
        max_abs=float(np.abs(difference).max()),
        mean_abs=float(np.abs(difference).mean()),
        mean_square=float(np.square(difference).mean()),
        relative_l2=float(np.linalg.norm(difference)) / max(norm, 1e-30),
        cosine=float(wanted @ got) / max(norm * other, 1e-30) if norm or other else 1.0,
        kl=kl_divergence(log_softmax(wanted), log_softmax(got)),
        margin=margin,
        same_top_1=int(np.argmax(wanted)) == int(np.argmax(got)),  # both take the first of equals
        top_k_overlap=overlap,
    )


def summary(rows: Sequence[RowDifference]) -> dict[str, float | int]:
    """The worst or mean of every measure over many rows, and the quantiles that published gates are written in."""
    errors, cosines = np.array([row.relative_l2 for row in rows]), np.array([row.cosine for row in rows])
    stable = [row.same_top_1 for row in rows if row.is_stable]
    return {
        "rows": len(rows),
        "relative_l2_max": max(row.relative_l2 for row in rows),
        "relative_l2_p95": _quantile(errors, 0.95),
        "max_abs": max(row.max_abs for row in rows),
        "mean_abs": float(np.mean([row.mean_abs for row in rows])),
        "cosine_min": min(row.cosine for row in rows),
        "cosine_p5": _quantile(cosines, 0.05),
        "sqnr_db_min": min(row.sqnr_db for row in rows),
        "kl_max": max(row.kl for row in rows),
        "top_1_agreement": float(np.mean([row.same_top_1 for row in rows])),
        "stable_rows": len(stable),
        "stable_top_1_agreement": float(np.mean(stable)) if stable else 1.0,
        "top_k_overlap_min": min(row.top_k_overlap for row in rows),
    }


def _quantile(values: Floats, share: float) -> float:
    """One of the values themselves: between infinities there is nothing to interpolate."""
    return float(np.quantile(values, share, method="higher" if share > 0.5 else "lower"))


def _largest(row: Floats, k: int) -> NDArray[np.intp]:
    if len(row) <= k:
        return np.argsort(-row, kind="stable")
    best = np.argpartition(-row, k)[:k]
    return best[np.argsort(-row[best], kind="stable")]


def kl_divergence(log_p: Floats, log_q: Floats) -> float:
    """Of one distribution from another, in nats; both given as log probabilities."""
    return max(0.0, float(np.sum(np.exp(log_p) * (log_p - log_q))))


def log_softmax(row: Floats) -> Floats:
    """Log probabilities of one row of logits, in float64."""
    shifted = row.astype(np.float64) - row.max()
    result: Floats = shifted - np.log(np.exp(shifted).sum())
    return result
