"""Optimisation profiles: for every input of a graph, the shapes that its engine will take. Made of the signature alone."""

from collections.abc import Mapping
from dataclasses import dataclass

from motrt.errors import InputError
from motrt.model_def.graph import Graph
from motrt.model_def.signature import BATCH, NEW_TOKENS, NUM_LOGITS, Signature
from motrt.runtime.engine_record import Range
from motrt.runtime.session import PREFILL_CHUNK

Shape = tuple[int, ...]


USUAL_BATCH, USUAL_NEW_TOKENS = Range(1, 1, 8), Range(1, 128, PREFILL_CHUNK)

# More rows than any step of a session has; more would not be refused before the graphs are traced.
MOST_OF_A_DIM = 1 << 16


@dataclass(frozen=True)
class Sizes:
    """What people say of the requests to come.

    Attributes:
        batch: rows.
        new_tokens: columns of one pass of the graph for prompts; longer prompts are read in several.
    """

    batch: Range = USUAL_BATCH
    new_tokens: Range = USUAL_NEW_TOKENS


def parse_range(text: str) -> Range:
    """``4,16`` (best, most), or one number for both. The least is 1: a prompt may end with one id, a batch with one row.

    Raises:
        InputError: for anything else.
    """
    parts = text.split(",")
    if len(parts) in (1, 2) and all(part.strip().isdecimal() and len(part) < 10 for part in parts):
        best, most = map(int, parts * 2 if len(parts) == 1 else parts)
        if 1 <= best <= most <= MOST_OF_A_DIM:
            return Range(1, best, most)
    raise InputError(
        f"sizes are BEST,MOST, ascending whole numbers in 1..{MOST_OF_A_DIM}, or one number for both ({text!r} came)"
    )


def ranges_for(graph: Graph, signature: Signature, sizes: Sizes) -> dict[str, Range]:
    """The sizes of every symbolic dim of ``signature``.

    As many rows of logits as rows are wanted at most: a pass that wants more is done in several.
    """
    dims = {dim for spec in signature.inputs for dim in spec.dims if isinstance(dim, str)}
    known = {BATCH: sizes.batch, NEW_TOKENS: sizes.new_tokens, NUM_LOGITS: sizes.batch}
    if graph.capacity is not None:
        known = {dim: _clipped(size, graph.capacity) if dim == NEW_TOKENS else size for dim, size in known.items()}
    return {dim: Range(1, known[dim].best, known[dim].most) for dim in sorted(dims)}


def profile_for(signature: Signature, ranges: Mapping[str, Range]) -> dict[str, tuple[Shape, Shape, Shape]]:
    """By input: its least, best and most shape."""
    return {
        spec.name: (
            tuple(ranges[dim].least if isinstance(dim, str) else dim for dim in spec.dims),
            tuple(ranges[dim].best if isinstance(dim, str) else dim for dim in spec.dims),
            tuple(ranges[dim].most if isinstance(dim, str) else dim for dim in spec.dims),
        )
        for spec in signature.inputs
    }


def _clipped(size: Range, most: int) -> Range:
    return Range(min(size.least, most), min(size.best, most), min(size.most, most))
