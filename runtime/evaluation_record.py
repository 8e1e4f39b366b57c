"""What an evaluation found: how well a model predicts a text, and how it differs from another. Kept by bundles.

Plain numbers; nothing here knows how they are measured. Standard library alone.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from math import isfinite
from typing import Any


@dataclass(frozen=True)
class ModalityFigures:
    """The positions that predict one modality.

    Attributes:
        predictions: how many there were.
        loss: mean of -log p(next id), in nats, within the modality's ids.
        perplexity: e to the loss: a uniform guess among so many ids predicts as well.
        against_perplexity: the other model's; None where there is none, as in what follows.
        kl_mean: mean Kullback-Leibler divergence, of the other model's distribution from this one's, in nats.
        kl_max: the largest.
        top_1_agreement: share of positions at which both have the same best id.
    """

    predictions: int
    loss: float
    perplexity: float
    against_perplexity: float | None = None
    kl_mean: float | None = None
    kl_max: float | None = None
    top_1_agreement: float | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], is_compared: bool) -> "ModalityFigures":
        """What ``asdict`` gave, with or without the other model's figures; KeyError, TypeError or ValueError otherwise."""
        names = [one.name for one in fields(cls) if is_compared or one.name in _ALONE]
        numbers = {name: float(values[name]) for name in names}
        if not all(map(isfinite, numbers.values())):
            raise ValueError("an evaluation's figures must be finite")
        return cls(int(values["predictions"]), **{name: value for name, value in numbers.items() if name != "predictions"})


_ALONE = ("predictions", "loss", "perplexity")


@dataclass(frozen=True)
class Evaluation:
    """One text, read in chunks of ``context`` ids, each with an empty cache.

    Attributes:
        text: the name of the file.
        ids_sha256: hash of the ids, as int64, chunk by chunk: whether two evaluations read the same.
        num_ids: how many were read.
        context: ids of a chunk, at most.
        backend: what computed: ``onnxruntime (CPU)``, with the weights' type.
        against: the other model, or None.
        modalities: the figures by predicted modality.
    """

    text: str
    ids_sha256: str
    num_ids: int
    context: int
    backend: str
    against: str | None
    modalities: Mapping[str, ModalityFigures]

    def is_of_the_same(self, other: "Evaluation") -> bool:
        """Tell whether both read the same ids in the same way, so that one takes the other's place."""
        return all(getattr(self, name) == getattr(other, name) for name in ("ids_sha256", "context", "backend", "against"))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"modalities": {name: asdict(one) for name, one in self.modalities.items()}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Evaluation":
        """What ``to_dict`` gave; KeyError, TypeError or ValueError for anything else."""
        is_compared = values["against"] is not None
        return cls(
            text=str(values["text"]),
            ids_sha256=str(values["ids_sha256"]),
            num_ids=int(values["num_ids"]),
            context=int(values["context"]),
            backend=str(values["backend"]),
            against=str(values["against"]) if is_compared else None,
            modalities={str(name): ModalityFigures.from_dict(one, is_compared) for name, one in values["modalities"].items()},
        )
