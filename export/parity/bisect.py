"""Where is the fault? The file is cut into the decoder's parts, and each is asked alone.

Every part is given what the reference had at its entrance, and must make what the reference made, within a budget that
follows from its own few roundings (as the gate's limit follows from all of them, ``runtime.tolerances``). So an error can not
travel: the first part that leaves its budget is where the fault is, and not where it shows. Beside that the layers run one
behind the other, each fed with what the one before made, which gives the drift of the residual stream.

Four passes are looked at: a ragged prefill of all modalities, a chunk behind it, a decode step, and the last slots of the
cache's buffers. What stands outside the graph (a session, a runtime's fusions across parts) is not in any part: where all
parts are well and the whole is not, it is there.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from motrt.errors import BackendError, ParityError
from motrt.export.parity.failing_part import Fed, write_failing_part
from motrt.export.parity.findings import json_number
from motrt.export.parity.graph_cuts import CutGraph
from motrt.export.parity.part_values import LOGITS, Part, Values, parts, record, stream, whole_layer
from motrt.export.parity.scenarios import SequenceMaker
from motrt.export.steps import Steps
from motrt.export.stored_weights import read_graph
from motrt.model_def.config import ModelConfig
from motrt.model_def.decoder import Cache, Decoder
from motrt.model_def.graph import CANONICAL, Graph
from motrt.model_def.signature import PRECISION_OF_DTYPE
from motrt.runtime.graph_choice import feed
from motrt.runtime.onnx_session import open_graph
from motrt.runtime.step_inputs import StepInputs, modality_of_ids
from motrt.runtime.tolerances import ACCUMULATION, SAFETY, UNIT_ROUNDOFF, relative_l2_limit

# Ids of each pass: a ragged prefill, a chunk behind it (and as many at the end), a decode step. The chunk ends in another
# bucket of modalities.
PROMPT, CHUNK = (12, 9, 6), 5
CAPACITY = 32
LAST_SLOTS = "last slots of the cache"

CACHES = ("past_", "present_")

# Rounding of what a part is given, and of its weights, to the graph's precision.
ROUNDINGS_AT_THE_ENTRANCE = 2


@dataclass(frozen=True)
class RecordedPass:
    """What the graph is fed in one pass, and every value of the reference."""

    name: str
    inputs: StepInputs
    values: Values


@dataclass(frozen=True)
class PartError:
    """The worst that one part did in all passes.

    Attributes:
        part: which one.
        error: relative L2 error of the worst row of any value that it makes.
        budget: what its roundings may come to.
        where: pass, value and row, for people.
        modality: the one that all rows over the budget belong to; None: several, or none is over.
    """

    part: Part
    error: float
    budget: float
    where: str = ""
    modality: str | None = None

    @property
    def is_over(self) -> bool:
        return not self.error <= self.budget

    def __str__(self) -> str:
        whose = "" if self.modality is None else f", {self.modality}"
        return f"{self.part}{whose}: relative L2 {self.error:.3g} over its budget of {self.budget:.3g} ({self.where})"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "layer": self.part.place,
            "part": self.part.name,
            "modality": self.modality,
            "error": json_number(self.error),
            "budget": json_number(self.budget),
            "where": self.where,
        }


@dataclass(frozen=True)
class Bisection:
    """Every part's error, and the drift.

    Attributes:
        graph: which one was cut.
        parts: in the order in which they compute.
        drift: the stream's error behind each layer by position, for charts; see ``Drift``.
        broken: why the graph could not be cut; empty where it could.
        folder: where the failing part was written; None where none was.
    """

    graph: str
    parts: tuple[PartError, ...]
    drift: Mapping[str, Any]
    broken: str = ""
    folder: Path | None = None

    @property
    def first(self) -> PartError | None:
        """The first part over its budget."""
        return next((one for one in self.parts if one.is_over), None)

    def sentence(self) -> str:
        """What it comes to."""
        if self.broken:
            return f"the graph is not built as the exporter builds it. {self.broken}"
        if self.first is None:
            return (
                "every part of the graph is within its budget: if the whole is not, the fault is outside the graph (what feeds "
                "it, or what the runtime makes of several parts together)"
            )
        return str(self.first)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, as the report's page reads them."""
        return {
            "graph": self.graph,
            "sentence": self.sentence(),
            "broken": self.broken,
            "first": None if self.first is None else self.first.to_dict(),
            "parts": [one.to_dict() for one in self.parts],
            "folder": None if self.folder is None else str(self.folder),
        }


# What is asked, and what the reference says.


def recorded_passes(decoder: Decoder, graph: Graph = CANONICAL) -> list[RecordedPass]:
    """Let the reference compute the passes part by part. A step's graph is asked its own step alone."""
    config = decoder.config
    rows = _rows(config, graph)
    capacity = min(CAPACITY, config.max_seq_len)
    cache: Cache = decoder.new_cache(len(rows), capacity)
    found, at = [], np.zeros(len(rows), np.int64)
    for name, counts in _counts(config, graph):
        if name == LAST_SLOTS:
            at = capacity - np.array(counts)  # zeros lie between, for the graph and the reference alike
        is_step = max(counts) == 1 and name != "prefill"
        inputs = _pass(config, rows, at, counts, graph if is_step else CANONICAL)
        values, cache = record(decoder, inputs, cache)
        if not graph.takes_one_token or is_step:
            found.append(RecordedPass(name, inputs, values))
        at = at + np.array(counts)
    return found


def _counts(config: ModelConfig, graph: Graph) -> Iterator[tuple[str, tuple[int, ...]]]:
    """New tokens of each row, pass by pass, as far as the model's positions reach."""
    room = min(CAPACITY, config.max_seq_len)
    prompt = tuple(max(1, min(count, room - 2)) for count in PROMPT)
    yield "prefill", prompt
    if max(prompt) + CHUNK + 1 <= room:
        yield "chunk", (CHUNK,) * len(prompt)
    if max(prompt) + 1 <= room:
        yield "decode step", (1,) * len(prompt)
        yield LAST_SLOTS, (1 if graph.takes_one_token else min(CHUNK, room),) * len(prompt)


def _rows(config: ModelConfig, graph: Graph) -> list[NDArray[np.int64]]:
    maker, length = SequenceMaker(config, seed=21), CAPACITY
    if graph.is_step:
        return [maker.row([graph.tokens or 0], length) for _ in PROMPT]
    count = len(config.modalities)
    return [maker.row(pattern, length) for pattern in ([0], [count - 1], [0, 0, *range(count), count - 1])]


def _pass(
    config: ModelConfig, rows: Sequence[NDArray[np.int64]], at: NDArray[np.int64], counts: Sequence[int], graph: Graph
) -> StepInputs:
    """The next ``counts`` ids of each row behind ``at``; short ones are padded with their own last id."""
    width = max(counts)
    ids = np.stack(
        [row[start + np.minimum(np.arange(width), count - 1)] for row, start, count in zip(rows, at, counts, strict=True)]
    )
    wanted = np.arange(ids.size, dtype=np.int64)
    here = modality_of_ids(ids, config)
    # Each position predicts its own modality or, in every third, the next one: heads and experts are routed apart.
    predicted = (here.flatten() + (wanted % 3 == 2)) % len(config.modalities)
    if graph.is_step:
        predicted = np.full(ids.size, graph.predicts, np.int64)
    return StepInputs(ids, here, at.copy(), wanted, predicted)


# What the file says.


def bisect(
    model_file: Path,
    config: ModelConfig,
    passes: Sequence[RecordedPass],
    conditioning: float,
    steps: Steps,
    num_threads: int = 0,
    graph: Graph = CANONICAL,
    folder: Path | None = None,
) -> Bisection:
    """Ask every part of a file alone, and every layer behind the one before.

    Args:
        model_file: the graph, its external data beside it.
        config: what it computes.
        passes: what ``recorded_passes`` gave, of the reference.
        conditioning: how many times more than a well-behaved model this one amplifies rounding: parts are allowed so much more.
        steps: told of progress.
        num_threads: onnxruntime's; 0: one per core.
        graph: which graph the file holds.
        folder: where to write the first part over its budget, with what it was fed (``failing_part``); None: nowhere.
    """
    model = read_graph(model_file)
    logits = "range_logits" if graph.is_step else LOGITS
    try:
        cuts = CutGraph(model, config, logits)
    except ParityError as broken:
        return Bisection(graph.name, (), {}, str(broken))
    asker = _Asker(cuts, model_file.parent, config, graph, num_threads, conditioning)
    errors = []
    with steps.step(f"ask the parts of {graph.name}", len(parts(config)), "parts") as advance:
        for part in parts(config):
            errors.append(asker.ask(part, passes))
            advance(1)
    with steps.step(f"follow the stream through {graph.name}"):
        drift = {} if any(not isfinite(one.error) for one in errors) else asker.drift(passes)
    found = Bisection(graph.name, tuple(errors), drift)
    if folder is None or found.first is None:
        return found
    write_failing_part(
        folder, asker.cut(found.first.part), model_file.parent, asker.fed(found.first.part, passes), str(found.first)
    )
    return Bisection(graph.name, found.parts, drift, folder=folder)


class _Asker:
    """Runs parts of one file in onnxruntime."""

    def __init__(
        self, cuts: CutGraph, folder: Path, config: ModelConfig, graph: Graph, num_threads: int, conditioning: float
    ) -> None:
        self._cuts, self._folder, self._config, self._graph = cuts, folder, config, graph
        self._num_threads, self._conditioning = num_threads, conditioning
        self._dtype = cuts.dtype
        self._precision = PRECISION_OF_DTYPE[self._dtype]

    def cut(self, part: Part) -> onnx.ModelProto:
        return self._cuts.between(part.inputs, part.outputs)

    def fed(self, part: Part, passes: Sequence[RecordedPass], instead: Sequence[Values] = ()) -> list[Fed]:
        """``instead``: values to feed in the place of the reference's, per pass."""
        told = []
        taken = {one.name for one in self.cut(part).graph.input}
        for number, one in enumerate(passes):
            values = {**one.values, **(instead[number] if instead else {})}
            given = {
                place: self._rounded(self._at_capacity(name, values[name]))
                for name, place in self._cuts.places.items()
                if place in taken and name in values
            }
            wanted = {self._cuts.places[name]: self._at_capacity(name, self._in_range(name, one)) for name in part.outputs}
            told.append(Fed(one.name, {**given, **feed(self._graph, one.inputs)}, wanted))
        return told

    def _rounded(self, value: NDArray[Any]) -> NDArray[Any]:
        return value.astype(np.dtype(self._dtype))

    def _at_capacity(self, name: str, value: NDArray[Any]) -> NDArray[Any]:
        """A cache as long as the graph wants it: zeros behind what the reference had, which nothing sees."""
        missing = (self._graph.capacity or 0) - value.shape[2] if value.ndim == 4 and name.startswith(CACHES) else 0
        # [b, k, t, d]
        return np.pad(value, ((0, 0), (0, 0), (0, missing), (0, 0))) if missing > 0 else value

    def _in_range(self, name: str, one: RecordedPass) -> NDArray[Any]:
        """A step gives the logits of its own range alone."""
        value = one.values[name]
        if name != LOGITS or not self._graph.is_step:
            return value
        ids = self._config.id_ranges[self._graph.predicts or 0]
        return value[:, ids.start : ids.stop]

    def ask(self, part: Part, passes: Sequence[RecordedPass]) -> PartError:
        try:
            return self._asked(part, passes)
        except BackendError as failure:  # a part that can not even be run is where the fault is
            return PartError(part, inf, self._budget(part, passes[0]), str(failure))

    def _asked(self, part: Part, passes: Sequence[RecordedPass]) -> PartError:
        worst, where, over = 0.0, "", set[str]()
        budget = 0.0
        with self._opened(part) as run:
            for one, fed in zip(passes, self.fed(part, passes), strict=True):
                budget = max(budget, allowed := self._budget(part, one))
                came = run(fed.inputs)
                for name in part.outputs:
                    place = self._cuts.places[name]
                    errors = row_errors(_as_rows(name, fed.expected[place]), _as_rows(name, came[place]))
                    row = int(np.argmax(errors))
                    if errors[row] > worst:
                        worst, where = float(errors[row]), f"{name} in the {one.name}, row {row}"
                    over |= self._modalities_over(name, errors > allowed, one)
        return PartError(part, worst, budget, where, over.pop() if len(over) == 1 else None)

    def _budget(self, part: Part, one: RecordedPass) -> float:
        roundings = part.roundings + ROUNDINGS_AT_THE_ENTRANCE
        own = SAFETY * UNIT_ROUNDOFF[self._precision] * ACCUMULATION[self._precision] * sqrt(roundings) * self._conditioning
        return own * (1.0 + _largest_score(part, one, self._config) if part.name == "attention" else 1.0)

    def _modalities_over(self, name: str, is_over: NDArray[np.bool_], one: RecordedPass) -> set[str]:
        """Whose rows they are: of the predicted modality for logits, of the token's own elsewhere; of caches nobody's."""
        masks = {one.inputs.modality_mask.size: one.inputs.modality_mask.flatten()}
        if name == LOGITS:
            masks = {one.inputs.head_mask.size: one.inputs.head_mask}
        mask = masks.get(is_over.size)
        names = self._config.modality_names
        return set(names) if mask is None and is_over.any() else {names[at] for at in (() if mask is None else mask[is_over])}

    def drift(self, passes: Sequence[RecordedPass]) -> dict[str, Any]:
        """The stream's error before each layer and behind the last one, by position."""
        carried: list[Values] = [{} for _ in passes]
        lines = [self._stream_errors(0, passes, self._made(Part(None, "embedding", (), (stream(0),), 1), passes, carried))]
        for layer in range(self._config.num_layers):
            made = self._made(whole_layer(layer), passes, carried)
            lines.append(self._stream_errors(layer + 1, passes, made))
        names = self._config.modality_names
        return {
            "layers": ["embedding", *(f"layer {layer}" for layer in range(self._config.num_layers))],
            "positions": [
                {
                    "row": row,
                    "position": int(one.inputs.cache_position[row]) + column,
                    "modality": names[mask],
                    "phase": one.name,
                }
                for one in passes
                for row, line in enumerate(one.inputs.modality_mask.tolist())
                for column, mask in enumerate(line)
            ],
            "relative_l2": [[json_number(float(one)) for one in line] for line in lines],
            "limit": relative_l2_limit(self._config, self._precision) * self._conditioning,
        }

    def _made(self, part: Part, passes: Sequence[RecordedPass], carried: list[Values]) -> list[Values]:
        """What ``part`` makes of what the parts before it made; ``carried`` then holds it, and the cache for the next pass."""
        with self._opened(part) as run:
            for number, fed in enumerate(self.fed(part, passes, carried)):
                came = run({**fed.inputs, **self._carried_cache(part, number, carried)})
                for name in part.outputs:
                    carried[number][name] = came[self._cuts.places[name]]
        return carried

    def _carried_cache(self, part: Part, number: int, carried: list[Values]) -> dict[str, NDArray[Any]]:
        """The cache that this very graph wrote in the pass before."""
        if number == 0 or part.layer is None or self._graph.takes_one_token:
            return {}
        (_, *past), (_, *present) = part.inputs, part.outputs
        return {name: carried[number - 1][new] for name, new in zip(past, present, strict=True)}

    def _stream_errors(self, layer: int, passes: Sequence[RecordedPass], made: Sequence[Values]) -> NDArray[np.float64]:
        name = stream(layer)
        return np.concatenate([row_errors(one.values[name], values[name]) for one, values in zip(passes, made, strict=True)])

    def _opened(self, part: Part) -> "_Run":
        return _Run(self.cut(part), self._folder, self._num_threads)


class _Run:
    """A cut graph in onnxruntime, with activations as they are."""

    def __init__(self, model: onnx.ModelProto, folder: Path, num_threads: int) -> None:
        self._names = [one.name for one in model.graph.output]
        self._inputs = {one.name for one in model.graph.input}
        self._session = open_graph(model.SerializeToString(), folder, num_threads)

    def __enter__(self) -> "_Run":
        return self

    def __exit__(self, *exception: object) -> None:
        del self._session

    def __call__(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        given = {name: value for name, value in inputs.items() if name in self._inputs}
        try:
            came = self._session.run(self._names, given)
        except Exception as failure:  # onnxruntime's exceptions share no base of their own
            raise BackendError(f"onnxruntime can not run it: {failure}") from failure
        return dict(zip(self._names, came, strict=True))


def _as_rows(name: str, value: NDArray[Any]) -> NDArray[Any]:
    """What is compared as one: a position of any value, a whole row of a cache."""
    if value.ndim != 4 or name.startswith("present_"):
        return value.reshape(len(value), -1)
    b, h, s, d = value.shape
    rows: NDArray[Any] = value.transpose(0, 2, 1, 3).reshape(b * s, h * d)  # [b, h, s, d] -> [b, s, h, d] -> [T, h * d]
    return rows


def row_errors(expected: NDArray[Any], came: NDArray[Any]) -> NDArray[np.float64]:
    """Relative L2 errors of the rows of two matrices; infinite where there is no number.

    -inf where -inf is expected counts as equal, and anything else there as no number: ids outside a modality's range.
    """
    if expected.shape != came.shape:
        return np.full(len(expected), inf)
    wanted, got = expected.astype(np.float64), came.astype(np.float64)
    is_never = np.isneginf(wanted)
    wanted = np.where(is_never, 0.0, wanted)
    with np.errstate(invalid="ignore", over="ignore"):
        difference = np.where(is_never, np.where(np.isneginf(got), 0.0, inf), got - wanted)
        errors = np.linalg.norm(difference, axis=1) / np.maximum(np.linalg.norm(wanted, axis=1), 1e-30)
    return np.where(np.isfinite(errors), errors, inf)


def _largest_score(part: Part, one: RecordedPass, config: ModelConfig) -> float:
    """The largest magnitude before the softmax: an error there is multiplied by it."""
    query, keys = (torch.from_numpy(one.values[name]).double() for name in part.inputs[:2])
    shared = keys.repeat_interleave(config.num_heads // config.num_kv_heads, dim=1)  # [b, k, t, d] -> [b, h, t, d]
    return float((query @ shared.transpose(2, 3)).abs().max()) / sqrt(config.head_size)
