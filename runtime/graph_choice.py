"""Which graph of a plan serves a pass, what it is fed, and how its logits become the contract's.

Derived graphs (``model_def.graph``) take fewer inputs than a pass has, because they know the rest beforehand. Every backend
that holds several graphs chooses here.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from motrt.errors import BackendError
from motrt.model_def import signature as names
from motrt.model_def.config import ModelConfig
from motrt.model_def.graph import Graph
from motrt.runtime.step_inputs import Int64, StepInputs


def serves(graph: Graph, inputs: StepInputs) -> bool:
    """Whether ``graph`` can do this pass: a step's one token per row must be of its modality, and predict its modality.

    A graph of one token per row of any modality is recorded with every row's logits, and serves where all are wanted.
    """
    rows, new_tokens = inputs.input_ids.shape
    if graph.takes_one_token and new_tokens != 1:
        return False
    if not graph.is_step:
        return not graph.one_token or len(inputs.logits_index) == rows
    return bool((inputs.modality_mask == graph.tokens).all() and (inputs.head_mask == graph.predicts).all())


def choose(graphs: Iterable[Graph], inputs: StepInputs) -> Graph:
    """The first that serves; a plan stands most special first.

    Raises:
        BackendError: where none does.
    """
    for graph in graphs:
        if serves(graph, inputs):
            return graph
    raise BackendError("no graph of this bundle serves this pass: export it again, with a graph for prompts and mixed batches")


def feed(graph: Graph, inputs: StepInputs) -> dict[str, Int64]:
    """The inputs that ``graph`` takes, by name, beside the cache."""
    named = inputs.named()
    if graph.is_step:
        return {name: named[name] for name in (names.INPUT_IDS, names.CACHE_POSITION)}
    return named


def num_logit_rows(graph: Graph, inputs: StepInputs) -> int:
    """How many rows of logits ``graph`` gives for this pass: a step gives every row's, wanted or not."""
    return inputs.input_ids.shape[0] if graph.is_step else len(inputs.logits_index)


def as_contract(graph: Graph, config: ModelConfig, logits: NDArray[np.float32], inputs: StepInputs) -> NDArray[np.float32]:
    """What ``graph`` gave as logits [n, v]: the wanted rows, -inf outside the predicted modality's range.

    Args:
        graph: what gave them.
        config: the model's.
        logits: [n, v], or [b, ids of the predicted modality] from a step.
        inputs: of the pass.
    """
    if not graph.is_step:
        return logits
    assert graph.predicts is not None
    whole = empty_contract(config, graph.predicts, len(inputs.logits_index))
    ids = config.id_ranges[graph.predicts]
    for row, wanted in zip(inputs.logits_index, whole, strict=True):  # one token per row: a flat position is a row
        wanted[ids.start : ids.stop] = logits[row]
    return whole


def empty_contract(config: ModelConfig, predicts: int, count: int) -> NDArray[np.float32]:
    """Logits [count, v] that are -inf outside modality ``predicts``'s range, and not yet written in it."""
    ids = config.id_ranges[predicts]
    whole = np.empty((count, config.vocab_size), np.float32)
    whole[:, : ids.start] = whole[:, ids.stop :] = -np.inf
    return whole
