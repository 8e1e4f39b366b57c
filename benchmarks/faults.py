"""Faults that an exporter, a runtime or a hand could make, and the bundles that they are planted in."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper

from motrt.benchmarks.builds import Build
from motrt.benchmarks.doctored import Doctored, exchange_places
from motrt.export.bundle_from_checkpoint import QuantizeOptions
from motrt.model_def.config import Modality, ModelConfig, RopeConfig, RopeScaling, SwigluExpert
from motrt.model_def.initialize import random_tensor
from motrt.model_def.operators import rope_tables
from motrt.model_def.parameters import EMBEDDING, parameters
from motrt.model_def.quantization import codes_of, scales_of, zero_points_of
from motrt.runtime.bundle import MANIFEST_FILE, MODEL_FILE, WEIGHTS_FILE, Manifest, open_bundle, write_manifest
from motrt.runtime.engine_record import EngineRecord
from motrt.runtime.kv_cache import KVCache
from motrt.runtime.onnx_session import BoundBuffers, OnnxSession
from motrt.runtime.session import Logits
from motrt.runtime.step_inputs import StepInputs

KINDS = ("weights", "routing", "cache", "numerics", "session", "files")

TINY = ModelConfig.tiny()
_EQUAL_EXPERT = SwigluExpert(96, bias=True)
# Every pair of weights that people confuse has one shape here: experts of two modalities, and q, k and v.
EQUAL = TINY.replace(
    num_kv_heads=TINY.num_heads,
    modalities=(Modality("text", 96, _EQUAL_EXPERT), Modality("audio", 32, _EQUAL_EXPERT)),
)
TIED = TINY.replace(head="shared", tied_embeddings=True, routed_attention=False, qk_norm=True)
HALF = TINY.replace(rope=RopeConfig(style="half"))

BUILDS: dict[str, Build] = {
    "fp32": Build(TINY),
    "fp32, another seed": Build(TINY, seed=1),
    "fp16": Build(TINY, "fp16"),
    "int4": Build(TINY, "int4"),
    "int4 with zero points": Build(TINY, "int4", options=QuantizeOptions(symmetric=False)),
    "equal experts, biases": Build(EQUAL),
    "tied, q/k norms": Build(TIED),
    "half rotation": Build(HALF),
    # Gates of a few hundred: what goes into w2 is beyond float16, and what comes out of it is not.
    "fp16, outlying weights": Build(
        TINY,
        "fp16",
        scaled=(
            ("layers.0.feed_forward.text.w1", 300.0),
            ("layers.0.feed_forward.text.w3", 300.0),
            ("layers.0.feed_forward.text.w2", 1 / 90000.0),
        ),
    ),
    "for cuda": Build(TINY, target="cuda"),
}

Value = NDArray[Any]
Plant = Callable[[Doctored], object]
Place = tuple[int | None, str]  # layer and part, as the bisection names them


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        name: what is wrong, in a few words.
        kind: one of ``KINDS``.
        build: what it is planted in, one of ``BUILDS``.
        plant: does it to a copy; of the kind ``session``: the class of the session that is examined.
        place: where the bisection must find it; None: it is in no part of a graph, and no part may be named.
        weight: what P1 must name, where what is stored is wrong and the reference reads it too.
        graph: the graph that it is planted in.
    """

    name: str
    kind: str
    build: str
    plant: Any
    place: Place | None = None
    weight: str | None = None
    graph: str = "model"


# Weights.


def _weight(layer: int, rest: str) -> str:
    return f"layers.{layer}.{rest}"


def swap_experts(layers: tuple[int, ...]) -> Plant:
    def plant(bundle: Doctored) -> None:
        for layer in layers:
            for name in bundle.names(_weight(layer, "feed_forward.text.")):
                bundle.exchange(name, name.replace(".text.", ".audio."))

    return plant


def change(name: str, how: Callable[[Value], Value]) -> Plant:
    return lambda bundle: bundle.change(name, how)


def exchange(one: str, other: str) -> Plant:
    return lambda bundle: bundle.exchange(one, other)


def row_of_another(value: Value) -> Value:
    value[3] = value[4]
    return value


def shifted_rows(value: Value) -> Value:
    return np.roll(value, 1, axis=0)


def one_value_changed(value: Value) -> Value:
    value[5] += 0.01
    return value


def one_scale_doubled(value: Value) -> Value:
    value[0, value.shape[1] // 2] *= 2
    return value


def one_more_in_one_place(value: Value) -> Value:
    numbers = value.astype(np.int8)
    numbers[0, 5] += 1 if numbers[0, 5] < 7 else -1
    return numbers


def one_step_up(value: Value) -> Value:
    return np.minimum(value.astype(np.int8) + 1, 7)


def one_percent_of_one_channel(value: Value) -> Value:
    value[7] *= 1.01
    return value


def through_half(value: Value) -> Value:
    return value.astype(np.float16).astype(value.dtype)


def not_a_number(value: Value) -> Value:
    value[0, 0] = np.nan
    return value


def layers_exchanged(bundle: Doctored) -> None:
    for name in bundle.names("layers.0."):
        bundle.exchange(name, name.replace("layers.0.", "layers.1."))


def layer_duplicated(bundle: Doctored) -> None:
    for name in bundle.names("layers.0."):
        bundle.set_weight(name.replace("layers.0.", "layers.1."), bundle.weight(name))


def other_tables(how: Callable[[RopeConfig], RopeConfig]) -> Plant:
    """The tables of other settings than the model's own."""

    def plant(bundle: Doctored) -> None:
        tables = rope_tables(how(bundle.config.rope), bundle.config.head_size, bundle.config.max_seq_len, torch.float32)
        for name, table in zip(("rope_cos", "rope_sin"), tables, strict=True):
            bundle.set_weight(name, table.numpy())

    return plant


def embedding_of_another_seed(bundle: Doctored) -> None:
    bundle.set_weight(EMBEDDING, _another_embedding(bundle.config))


def stale_tied_head(bundle: Doctored) -> None:
    """The head is a copy of a table that has been trained further since."""
    bundle.node("Gemm", "decoder").input[1] = bundle.constant(_another_embedding(bundle.config), "float32")


def _another_embedding(config: ModelConfig) -> Value:
    table = next(one for one in parameters(config) if one.name == EMBEDDING)
    value: Value = random_tensor(config, table, seed=1).numpy()
    return value


def set_attribute(op_type: str, name: str, value: float | str, start: str = "") -> Plant:
    """On every node of a kind that came from a module."""

    def plant(bundle: Doctored) -> None:
        for node in bundle.nodes(op_type, start):
            kept = [one for one in node.attribute if one.name != name]
            del node.attribute[:]
            node.attribute.extend([*kept, helper.make_attribute(name, value)])

    return plant


def scaled_attribute(op_type: str, name: str, factor: float, start: str = "") -> Plant:
    """A number of every node of a kind that came from a module, so many times as large."""

    def plant(bundle: Doctored) -> None:
        for node in bundle.nodes(op_type, start):
            for one in node.attribute:
                if one.name == name:
                    one.f *= factor

    return plant


def scales_read_crosswise(bundle: Doctored) -> None:
    """Both stored right, and each read where the other should be."""
    first, second = (scales_of(_weight(0, f"feed_forward.text.{name}.weight")) for name in ("w1", "w3"))
    other = {first: second, second: first}
    for node in (*bundle.nodes("DequantizeLinear"), *bundle.nodes("Cast")):  # float16 scales are cast
        node.input[:] = [other.get(name, name) for name in node.input]


def turned_back_whole(bundle: Doctored) -> None:
    """The same numbers, unpacked at every step: codes that save nothing."""
    product = bundle.node("MatMul", "layers.0.feed_forward.text.w1")
    bundle.read_instead(product, 1, lambda value: bundle.make("Identity", value))


# Routing.


def flip(mask: str) -> Plant:
    def plant(bundle: Doctored) -> None:
        readers = [node for node in bundle.model.graph.node if mask in node.input and node.op_type != "Shape"]
        flipped = bundle.make("Sub", bundle.constant(1), mask)
        for node in readers:
            node.input[:] = [flipped if name == mask else name for name in node.input]

    return plant


def shift_mask(bundle: Doctored) -> None:
    """Every position goes through the modality of the one before it."""
    ends, most = bundle.constant([-1]), bundle.constant([2**31 - 1])

    def shifted(value: str) -> str:
        last = bundle.make("Slice", value, ends, most)
        return bundle.make("Concat", last, bundle.make("Slice", value, bundle.constant([0]), ends), axis=0)

    bundle.behind(bundle.node("Reshape", "decoder").output[0], shifted)


def head_routed_by_tokens(bundle: Doctored) -> None:
    """The modality at the position, and not the one that it predicts."""
    here = bundle.make("Gather", bundle.node("Reshape", "decoder").output[0], "logits_index", axis=0)
    for node in bundle.model.graph.node:
        if node.op_type == "Equal":
            node.input[:] = [here if name == "head_mask" else name for name in node.input]


def filter_lets(modality: int, token_id: int, is_wanted: bool) -> Plant:
    """One id more, or one fewer, when ``modality`` is predicted."""

    def plant(bundle: Doctored) -> None:
        is_id = np.arange(bundle.config.vocab_size)[None] == token_id
        predicted = bundle.make("Equal", "head_mask", bundle.constant(modality))
        column = bundle.make("Unsqueeze", predicted, bundle.constant([1]))
        there = bundle.make("And", column, bundle.constant(is_id, "bool"))
        value = bundle.constant(0.0 if is_wanted else -np.inf, "float32")
        bundle.behind("logits", lambda logits: bundle.make("Where", there, value, logits))

    return plant


def owner_border(shift: int) -> Plant:
    """Of a shared head: whose id is it at the border of two ranges?"""

    def plant(bundle: Doctored) -> None:
        equal = next(node for node in bundle.nodes("Equal") if node.input[0] in bundle.names())
        owners = bundle.weight(equal.input[0])
        equal.input[0] = bundle.constant(np.arange(len(owners)) >= owners.tolist().index(1) + shift)

    return plant


def projections_exchanged(bundle: Doctored) -> None:
    """Layer 1 projects text with what is audio's, and the other way about."""
    for name in ("wq", "wk", "wv"):
        text, audio = (bundle.node("Gemm", f"layers.1.attention.{name}.{route}") for route in ("text", "audio"))
        text.input[1], audio.input[1] = audio.input[1], text.input[1]


def experts_not_routed(bundle: Doctored) -> None:
    """All rows of layer 1 go through the text expert."""
    for node in bundle.nodes("Gemm", "layers.1.feed_forward.audio"):
        node.input[:] = [name.replace(".audio.", ".text.") if name.startswith("layers.") else name for name in node.input]


def rows_not_put_back(start: str, number: int) -> Plant:
    """What the routes made stays as they made it, one route behind the other."""

    def plant(bundle: Doctored) -> None:
        order = bundle.node("Range", "decoder").output[0]
        bundle.node("Gather", start, number).input[1] = order

    return plant


def pads_leak(bundle: Doctored) -> None:
    """Short rows see as far as the longest one: what lies behind them are pads, and what other rows never wrote."""

    def furthest(value: str) -> str:
        return bundle.make("ReduceMax", value, bundle.constant([0]), keepdims=1)

    for node in bundle.nodes("LessOrEqual"):
        bundle.read_instead(node, 1, furthest)


# The cache.


def write_back_by_one(cache: str) -> Plant:
    def plant(bundle: Doctored) -> None:
        node = _scatter(bundle, cache)
        before = bundle.make("Sub", "cache_position", bundle.constant(1))
        node.input[2] = bundle.make("Max", before, bundle.constant(0))

    return plant


def _scatter(bundle: Doctored, cache: str) -> Any:
    return next(node for node in bundle.nodes("TensorScatter") if node.input[0] == cache)


def newest_not_written(bundle: Doctored) -> None:
    """The last new slot of layer 0's values stays as it was."""
    node = _scatter(bundle, "past_value.0")
    columns = bundle.node("Add", "decoder").output[0]  # [b, s]
    last = bundle.make("ReduceMax", columns, bundle.constant([1]), keepdims=1)
    slots = bundle.make("Unsqueeze", bundle.node("LessOrEqual").input[0], bundle.constant([0]))  # [1, t]
    is_last = bundle.make("Unsqueeze", bundle.make("Equal", slots, last), bundle.constant([1, 3]))  # [b, 1, t, 1]
    bundle.behind(node.output[0], lambda written: bundle.make("Where", is_last, "past_value.0", written))


def rows_rolled(cache: str) -> Plant:
    def plant(bundle: Doctored) -> None:
        ends, most, first = bundle.constant([-1]), bundle.constant([2**31 - 1]), bundle.constant([0])

        def rolled(value: str) -> str:
            return bundle.make(
                "Concat", bundle.make("Slice", value, ends, most), bundle.make("Slice", value, first, ends), axis=0
            )

        bundle.read_instead(_scatter(bundle, cache), 0, rolled)

    return plant


def written_at_the_start(cache: str) -> Plant:
    return lambda bundle: bundle.read_instead(
        _scatter(bundle, cache), 2, lambda position: bundle.make("Mul", position, bundle.constant(0))
    )


def heads_rolled(bundle: Doctored) -> None:
    """Each query head of layer 0 attends over its neighbour's keys."""
    order = bundle.constant(np.roll(np.arange(bundle.config.num_heads), -1))

    def rolled(rows: str) -> str:
        heads = bundle.make("Reshape", rows, bundle.constant([0, bundle.config.num_heads, -1]))
        turned = bundle.make("Gather", heads, order, axis=1)
        return bundle.make("Reshape", turned, bundle.constant([0, bundle.config.num_heads * bundle.config.head_size]))

    for product in bundle.nodes("Gemm", "layers.0.attention.wq."):
        bundle.behind(product.output[0], rolled)


def clamped_at_the_end(bundle: Doctored) -> None:
    """The capacity's bound is off by one: the buffer's last slot is never written."""
    new = bundle.make("Shape", "input_ids", start=1, end=2)
    room = bundle.make("Sub", bundle.make("Shape", "past_key.1", start=2, end=3), new)
    furthest = bundle.make("Sub", room, bundle.constant([1]))
    for cache in ("past_key.1", "past_value.1"):
        bundle.read_instead(_scatter(bundle, cache), 2, lambda position: bundle.make("Min", position, furthest))


def keys_and_values_exchanged(bundle: Doctored) -> None:
    """Layer 1 writes its keys where values should be."""
    keys, values = _scatter(bundle, "past_key.1"), _scatter(bundle, "past_value.1")
    keys.input[1], values.input[1] = values.input[1], keys.input[1]


def never_written(layer: int) -> Plant:
    def plant(bundle: Doctored) -> None:
        for kind in ("key", "value"):
            node = _scatter(bundle, f"past_{kind}.{layer}")
            node.op_type = "Identity"
            del node.input[1:]
            del node.attribute[:]

    return plant


def rotated_as_if_first(bundle: Doctored) -> None:
    """New tokens are rotated by their place in this pass alone."""
    here = bundle.make("Sub", bundle.node("Add", "decoder").output[0], bundle.node("Unsqueeze", "decoder").output[0])
    for node in bundle.nodes("RotaryEmbedding"):
        node.input[3] = here


def sees_ahead(bundle: Doctored) -> None:
    for node in bundle.nodes("LessOrEqual"):
        bundle.read_instead(node, 1, lambda value: bundle.make("Add", value, bundle.constant(1)))


def sees_its_whole_pass(bundle: Doctored) -> None:
    """The mask is filled in by row, and not by position."""
    for node in bundle.nodes("LessOrEqual"):
        bundle.read_instead(node, 1, lambda value: bundle.make("ReduceMax", value, bundle.constant([2]), keepdims=1))


def does_not_see_itself(bundle: Doctored) -> None:
    for node in bundle.nodes("LessOrEqual"):
        node.op_type = "Less"


# Numerics.


def nothing(bundle: Doctored) -> None:
    """The fault is in what was asked for: this model does not fit this precision."""


def cast_through(kind: int, find: Callable[[Doctored], str]) -> Plant:
    return lambda bundle: bundle.behind(find(bundle), bundle.through(kind))


def made_by(op_type: str, start: str, number: int = 0) -> Callable[[Doctored], str]:
    """The value that a node makes."""
    return lambda bundle: str(bundle.node(op_type, start, number).output[0])


def gelu_for_silu(bundle: Doctored) -> None:
    gate, value = bundle.node("Mul", "layers.1.feed_forward.text"), bundle.node("Mul", "layers.1.feed_forward.text", 1)
    value.input[0] = bundle.make("Gelu", gate.input[0], approximate="none")


def small_negative_mask(bundle: Doctored) -> None:
    """-10 where -inf should be."""

    def added(visible: str) -> str:
        return bundle.make("Where", visible, bundle.constant(0.0, "float32"), bundle.constant(-10.0, "float32"))

    for node in bundle.nodes("Attention"):
        bundle.read_instead(node, 3, added)


def residual_dropped(bundle: Doctored) -> None:
    node = bundle.node("Add", "layers.1", 1)
    node.op_type = "Identity"
    node.input[:] = [node.input[1]]


def residual_twice(bundle: Doctored) -> None:
    node = bundle.node("Add", "layers.0")
    stream = node.input[0]
    bundle.read_instead(node, 1, lambda value: bundle.make("Add", value, stream))


# Sessions.


class LosesWhenGrowing(OnnxSession):
    """A buffer that grows forgets its sixth position."""

    def grow_buffers(self, buffers: BoundBuffers, capacity: int) -> BoundBuffers:
        grown = super().grow_buffers(buffers, capacity)
        for value in grown.values:
            value.numpy()[:, :, 5] = 0
        return grown


class MixesRows(OnnxSession):
    """Rows of one modality get each other's logits."""

    def execute(self, inputs: StepInputs, cache: KVCache) -> Logits:
        logits = super().execute(inputs, cache)
        is_mixed = cache.batch_size > 1 and len(logits) > 1 and inputs.head_mask[0] == inputs.head_mask[-1]
        return logits[::-1].copy() if is_mixed else logits


class StreamsAnotherToken(OnnxSession):
    """The sixth token that is told is not the one that was chosen."""

    def generate(self, *arguments: Any, **named: Any) -> Any:
        for step in super().generate(*arguments, **named):
            yield replace(step, token_id=self.config.id_ranges[0].start) if step.index == 5 else step


class OffByOneInDecode(OnnxSession):
    """Decode steps overwrite the newest slot."""

    def execute(self, inputs: StepInputs, cache: KVCache) -> Logits:
        is_step = inputs.input_ids.shape[1] == 1 and cache.capacity > 1
        position = np.maximum(inputs.cache_position - 1, 0) if is_step else inputs.cache_position
        return super().execute(replace(inputs, cache_position=position), cache)


class WrongWhenLate(OnnxSession):
    """Right until a row holds 40 positions."""

    def execute(self, inputs: StepInputs, cache: KVCache) -> Logits:
        logits = super().execute(inputs, cache)
        return np.where(np.isfinite(logits), -logits, logits) if inputs.cache_position[0] >= 40 else logits


class RoutesHeadByToken(OnnxSession):
    """A caller that mixes up the two masks of a decode step."""

    def execute(self, inputs: StepInputs, cache: KVCache) -> Logits:
        if inputs.input_ids.shape[1] == 1 and len(inputs.head_mask) == len(inputs.modality_mask):
            inputs = replace(inputs, head_mask=inputs.modality_mask.flatten())
        return super().execute(inputs, cache)


# Files, as they come back from a disk or a network. The manifest stays as it was.

Bundles = Mapping[str, Path]


def copied(bundle: Path, work: Path) -> Path:
    return Doctored(bundle, work).folder


def data_of_another(bundle: Path, work: Path, bundles: Bundles) -> Path:
    """Another seed: the same names, and a file of the same size."""
    folder = copied(bundle, work)
    shutil.copyfile(bundles["fp32, another seed"] / WEIGHTS_FILE, folder / WEIGHTS_FILE)
    return folder


def one_bit(bundle: Path, work: Path, bundles: Bundles) -> Path:
    folder = copied(bundle, work)
    data = bytearray((folder / WEIGHTS_FILE).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / WEIGHTS_FILE).write_bytes(data)
    return folder


def truncated(bundle: Path, work: Path, bundles: Bundles) -> Path:
    folder = copied(bundle, work)
    (folder / WEIGHTS_FILE).write_bytes((folder / WEIGHTS_FILE).read_bytes()[:-64])
    return folder


def graph_of_another(bundle: Path, work: Path, bundles: Bundles) -> Path:
    folder = copied(bundle, work)
    (folder / MODEL_FILE).write_bytes((bundles["half rotation"] / MODEL_FILE).read_bytes())
    return folder


def file_missing(bundle: Path, work: Path, bundles: Bundles) -> Path:
    folder = copied(bundle, work)
    (folder / "decode.audio.onnx").unlink()
    return folder


def derived_graph_of_another(bundle: Path, work: Path, bundles: Bundles) -> Path:
    folder = copied(bundle, work)
    text, audio = folder / "decode.text.onnx", folder / "decode.audio.onnx"
    first, second = text.read_bytes(), audio.read_bytes()
    text.write_bytes(second)
    audio.write_bytes(first)
    return folder


def manifest_edited(bundle: Path, work: Path, bundles: Bundles) -> Path:
    """By hand: the verdict is made to say PASS."""
    folder = copied(bundle, work)
    values = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
    values["parity"] = {"verdict": "PASS", "findings": []}
    (folder / MANIFEST_FILE).write_text(json.dumps(values, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return folder


def manifest_rewritten(bundle: Path, work: Path, bundles: Bundles) -> Path:
    """By a program that knows how a manifest is hashed: another theta. Its files are as they were."""
    folder = copied(bundle, work)
    manifest = open_bundle(folder).manifest
    write_manifest(folder, replace(manifest, config=manifest.config.replace(rope=RopeConfig(theta=10000.0))))
    return folder


def other_checkpoint(bundle: Path, work: Path, bundles: Bundles) -> Path:
    """The bundle of another seed's model, whole in itself, in the place of this one."""
    folder = copied(bundle, work)
    manifest = open_bundle(folder).manifest
    write_manifest(folder, replace(manifest, source={**manifest.source, "sha256": "0" * 64}))
    return folder


def _with_engine(bundle: Path, work: Path) -> tuple[Path, Manifest]:
    """A bundle with an engine of its first graph; no bundle's check reads more of an engine than its bytes."""
    doctored = Doctored(bundle, work)
    manifest = open_bundle(doctored.folder).manifest
    graph = manifest.graphs[0]
    (doctored.folder / "step.engine").write_bytes(b"an engine of this model")
    doctored.vouch()
    manifest = open_bundle(doctored.folder).manifest
    engine = EngineRecord(
        graph=graph.name,
        file="step.engine",
        flavour="tensorrt",
        precision="fp16",
        versions={},
        gpu=None,
        compute_capabilities=(),
        ranges={},
        onnx_sha256=manifest.files[graph.file_name].sha256,
        sha256=manifest.files["step.engine"].sha256,
    )
    write_manifest(doctored.folder, replace(manifest, engines=(engine,)))
    return doctored.folder, open_bundle(doctored.folder).manifest


def engine_of_another(bundle: Path, work: Path, bundles: Bundles) -> Path:
    folder, _ = _with_engine(bundle, work)
    (folder / "step.engine").write_bytes(b"an engine of that model")
    return folder


def engine_of_another_graph(bundle: Path, work: Path, bundles: Bundles) -> Path:
    """The record was carried over with the engine; the graph that it was built of is not the one that lies here."""
    folder, manifest = _with_engine(bundle, work)
    write_manifest(folder, replace(manifest, engines=(replace(manifest.engines[0], onnx_sha256="0" * 64),)))
    return folder


# Derived graphs.


def embedding_rows_shifted(bundle: Doctored) -> None:
    """A step subtracts where its range begins: one too much."""
    gather = bundle.node("Gather", "tok_embeddings") if bundle.nodes("Gather", "tok_embeddings") else _embedding_gather(bundle)
    bundle.read_instead(gather, 1, lambda ids: bundle.make("Sub", ids, bundle.constant(1)))


def _embedding_gather(bundle: Doctored) -> Any:
    """The gather of embeddings, whose table may be a slice of the whole."""
    behind = {EMBEDDING}
    for node in bundle.model.graph.node:
        if behind.intersection(node.input) and node.op_type in ("Slice", "Gather", "Identity"):
            if node.op_type == "Gather":
                return node
            behind.update(node.output)
    raise AssertionError("no operator gathers embeddings")


def read_from_elsewhere(one: str, other: str) -> Plant:
    """Two weights of a derived graph lie where the other's bytes are."""

    def plant(bundle: Doctored) -> None:
        exchange_places(bundle.tensor(one), bundle.tensor(other))

    return plant


# All of them.

NORM, PROJECTIONS, ROTATION, CACHE = "attention norm", "q/k/v projections", "rotation", "cache write"
ATTENTION, OUTPUT, FFN_NORM, EXPERTS = "attention", "output projection", "ffn norm", "experts"
W1 = _weight(0, "feed_forward.text.w1.weight")
_BORDER = TINY.id_ranges[1].start


def _weight_faults() -> list[Fault]:
    def fault(name: str, build: str, plant: Plant, place: Place | None, weight: str | None = None) -> Fault:
        return Fault(name, "weights", build, plant, place, weight)

    equal, tied = "equal experts, biases", "tied, q/k norms"
    return [
        fault("experts swapped between modalities", equal, swap_experts((0, 1)), (0, EXPERTS)),
        fault("experts of one layer swapped", equal, swap_experts((1,)), (1, EXPERTS)),
        fault(
            "a square weight transposed",
            "fp32",
            change(_weight(0, "attention.wo.text.weight"), lambda value: np.ascontiguousarray(value.T)),
            (0, OUTPUT),
        ),
        fault(
            "one row is another's", "fp32", change(_weight(1, "attention.wq.audio.weight"), row_of_another), (1, PROJECTIONS)
        ),
        fault("one bias dropped", equal, change(_weight(1, "feed_forward.audio.w2.bias"), np.zeros_like), (1, EXPERTS)),
        fault(
            "one value of a bias off by 0.01",
            equal,
            change(_weight(0, "feed_forward.text.w1.bias"), one_value_changed),
            (0, EXPERTS),
        ),
        fault("the scale of one int4 block doubled", "int4", change(scales_of(W1), one_scale_doubled), None, W1),
        fault("one scale of the int8 table doubled", "int4", change(scales_of(EMBEDDING), one_scale_doubled), None, EMBEDDING),
        fault("int4 codes shifted by one place", "int4", change(codes_of(W1), shifted_rows), None, W1),
        fault("int4 codes one step up", "int4", change(codes_of(W1), one_step_up), None, W1),
        fault(
            "one zero point off by one", "int4 with zero points", change(zero_points_of(W1), one_more_in_one_place), None, W1
        ),
        fault("scales of two weights read crosswise", "int4", scales_read_crosswise, (0, EXPERTS)),
        fault("a stale tied head", tied, stale_tied_head, (None, "head")),
        fault("a tied table of another seed", tied, embedding_of_another_seed, (None, "embedding")),
        fault("embeddings shifted by one id", "fp32", change(EMBEDDING, shifted_rows), (None, "embedding")),
        fault(
            "half rotation where pairs are interleaved",
            "fp32",
            set_attribute("RotaryEmbedding", "interleaved", 0),
            (0, ROTATION),
        ),
        fault(
            "interleaved rotation of one layer where halves are turned",
            "half rotation",
            set_attribute("RotaryEmbedding", "interleaved", 1, "layers.1."),
            (1, ROTATION),
        ),
        fault(
            "another theta in the tables",
            "fp32",
            other_tables(lambda rope: replace(rope, theta=0.9 * rope.theta)),
            (0, ROTATION),
        ),
        fault(
            "rotation scaled where it should not be",
            "fp32",
            other_tables(lambda rope: replace(rope, scaling=RopeScaling())),
            (0, ROTATION),
        ),
        fault("epsilon 1e-2 for 1e-5", "fp32", set_attribute("RMSNormalization", "epsilon", 1e-2), (0, NORM)),
        fault(
            "epsilon 1e-6 for 1e-5 in one norm",
            "fp32",
            set_attribute("RMSNormalization", "epsilon", 1e-6, "layers.1.ffn_norm"),
            (1, FFN_NORM),
        ),
        fault("the weight of a norm dropped", "fp32", change(_weight(1, "ffn_norm.weight"), np.ones_like), (1, FFN_NORM)),
        fault(
            "one channel of the final norm off by 1%",
            "fp32",
            change("norm.weight", one_percent_of_one_channel),
            (None, "final norm"),
        ),
        fault(
            "q and k swapped",
            equal,
            exchange(_weight(0, "attention.wq.text.weight"), _weight(0, "attention.wk.text.weight")),
            (0, PROJECTIONS),
        ),
        fault(
            "k and v swapped",
            equal,
            exchange(_weight(1, "attention.wk.audio.weight"), _weight(1, "attention.wv.audio.weight")),
            (1, PROJECTIONS),
        ),
        fault(
            "norms of q and k swapped",
            tied,
            exchange(_weight(1, "attention.q_norm.shared.weight"), _weight(1, "attention.k_norm.shared.weight")),
            (1, PROJECTIONS),
        ),
        fault(
            "the norm of q dropped", tied, change(_weight(0, "attention.q_norm.shared.weight"), np.ones_like), (0, PROJECTIONS)
        ),
        fault("two layers in the other order", "fp32", layers_exchanged, (0, NORM)),
        fault("one layer's weights are another's", "fp32", layer_duplicated, (1, NORM)),
        fault(
            "an fp16 row is another's", "fp16", change(_weight(0, "feed_forward.text.w3.weight"), row_of_another), (0, EXPERTS)
        ),
        fault(
            "one weight is not a number", "fp32", change(_weight(0, "attention.wv.text.weight"), not_a_number), (0, PROJECTIONS)
        ),
        Fault(
            "two weights of a derived graph read from each other's place",
            "weights",
            "for cuda",
            read_from_elsewhere(_weight(1, "attention.wk.text.weight"), _weight(1, "attention.wv.text.weight")),
            (1, PROJECTIONS),
            graph="decode.text",
        ),
    ]


def _routing_faults() -> list[Fault]:
    def fault(name: str, build: str, plant: Plant, place: Place | None, graph: str = "model") -> Fault:
        return Fault(name, "routing", build, plant, place, graph=graph)

    equal, tied, head = "equal experts, biases", "tied, q/k norms", (None, "head")
    return [
        fault("the experts' mask flipped", equal, flip("modality_mask"), (0, PROJECTIONS)),
        fault("the experts' mask shifted by one", "fp32", shift_mask, (0, PROJECTIONS)),
        fault("the head's mask flipped", "fp32", flip("head_mask"), head),
        fault("experts right, head routed by the token's modality", "fp32", head_routed_by_tokens, head),
        fault("the text head shifted by one id", "fp32", change("output.text.weight", shifted_rows), head),
        fault("the audio head shifted by one id", "fp32", change("output.audio.weight", shifted_rows), head),
        fault("the text filter too narrow at its end", "fp32", filter_lets(0, _BORDER - 1, False), head),
        fault("the text filter too wide at its end", "fp32", filter_lets(0, _BORDER, True), head),
        fault("the audio filter too narrow at its beginning", "fp32", filter_lets(1, _BORDER, False), head),
        fault("the audio filter too wide at its beginning", "fp32", filter_lets(1, _BORDER - 1, True), head),
        fault("the text filter lets the last id of all through", "fp32", filter_lets(0, TINY.vocab_size - 1, True), head),
        fault("the audio filter lets the first id of all through", "fp32", filter_lets(1, 0, True), head),
        fault("a shared head's border one id too early", tied, owner_border(-1), head),
        fault("a shared head's border one id too late", tied, owner_border(1), head),
        fault("pads leak into shorter rows", "fp32", pads_leak, (0, ATTENTION)),
        fault("query heads attend over their neighbours' keys", "fp32", heads_rolled, (0, PROJECTIONS)),
        fault("one layer's projections routed by the wrong mask", equal, projections_exchanged, (1, PROJECTIONS)),
        fault("one layer's experts not routed", equal, experts_not_routed, (1, EXPERTS)),
        fault(
            "experts' rows not put back in their places", "fp32", rows_not_put_back("layers.1.feed_forward/", 2), (1, EXPERTS)
        ),
        fault(
            "attention's rows not put back in their places", "fp32", rows_not_put_back("layers.0.attention/", 7), (0, OUTPUT)
        ),
        fault(
            "a step takes the embedding beside its own", "for cuda", embedding_rows_shifted, (None, "embedding"), "decode.audio"
        ),
    ]


def _cache_faults() -> list[Fault]:
    def fault(name: str, plant: Plant, place: Place | None, build: str = "fp32", graph: str = "model") -> Fault:
        return Fault(name, "cache", build, plant, place, graph=graph)

    return [
        fault("keys of one layer written one place back", write_back_by_one("past_key.1"), (1, CACHE)),
        fault("a stale slot: the newest value is not written", newest_not_written, (0, CACHE)),
        fault("rows of a layer's values rolled", rows_rolled("past_value.0"), (0, CACHE)),
        fault("the position bounded one before the buffer's end", clamped_at_the_end, (1, CACHE)),
        fault("values written always at the start", written_at_the_start("past_value.1"), (1, CACHE)),
        fault("keys and values exchanged in one layer's cache", keys_and_values_exchanged, (1, CACHE)),
        fault("one layer's cache never written", never_written(1), (1, CACHE)),
        fault("the rotation ignores what the cache holds", rotated_as_if_first, (0, ROTATION)),
        fault("the mask sees one position ahead", sees_ahead, (0, ATTENTION)),
        fault("the mask sees its whole pass", sees_its_whole_pass, (0, ATTENTION)),
        fault("a position does not see itself", does_not_see_itself, (0, ATTENTION)),
        fault("a step writes one place back", write_back_by_one("past_key.0"), (0, CACHE), "for cuda", "decode.text"),
    ]


def _numeric_faults() -> list[Fault]:
    def fault(name: str, plant: Plant, place: Place | None, build: str = "fp32") -> Fault:
        return Fault(name, "numerics", build, plant, place)

    half, brain = TensorProto.FLOAT16, TensorProto.BFLOAT16
    return [
        fault("activations that overflow float16", nothing, (0, EXPERTS), "fp16, outlying weights"),
        fault(
            "one layer's gate computed in fp16",
            cast_through(half, made_by("Mul", "layers.1.feed_forward.text", 1)),
            (1, EXPERTS),
        ),
        fault(
            "one layer's attention rounded to bf16",
            cast_through(brain, made_by("Attention", "layers.0.attention/")),
            (0, OUTPUT),  # attention gives it unrounded; what the next part reads is rounded
        ),
        fault("one weight rounded to fp16", change(_weight(0, "feed_forward.text.w2.weight"), through_half), (0, EXPERTS)),
        fault("approximate GELU", set_attribute("Gelu", "approximate", "tanh"), (0, EXPERTS)),
        fault("GELU in the place of SiLU", gelu_for_silu, (1, EXPERTS)),
        fault("softmax scaled by sqrt(2) too much", scaled_attribute("Attention", "scale", 2**0.5), (0, ATTENTION)),
        fault(
            "softmax of one layer scaled by a hundredth too much",
            scaled_attribute("Attention", "scale", 1.01, "layers.1."),
            (1, ATTENTION),
        ),
        fault("softmax of one layer not scaled", set_attribute("Attention", "scale", 1.0, "layers.1."), (1, ATTENTION)),
        fault("logits cast through fp16", cast_through(half, lambda bundle: "logits"), (None, "head")),
        fault("-10 in the mask for -inf", small_negative_mask, (0, ATTENTION)),
        fault("a residual dropped", residual_dropped, (1, EXPERTS)),
        fault("a residual added twice", residual_twice, (0, OUTPUT)),
    ]


def _session_faults() -> list[Fault]:
    kinds = {
        "growing the cache loses a key": LosesWhenGrowing,
        "rows of a batch mixed up": MixesRows,
        "streaming says another token": StreamsAnotherToken,
        "decode steps overwrite the newest slot": OffByOneInDecode,
        "wrong from the fortieth position on": WrongWhenLate,
        "a step's head routed by the token's modality": RoutesHeadByToken,
    }
    return [Fault(name, "session", "fp32", kind) for name, kind in kinds.items()]


def _file_faults() -> list[Fault]:
    def fault(name: str, plant: Callable[[Path, Path, Bundles], Path], build: str = "fp32", weight: str | None = None) -> Fault:
        return Fault(name, "files", build, plant, weight=weight)

    return [
        fault("weights of another model, as large", data_of_another),
        fault("one bit of the weights flipped", one_bit),
        fault("the weights' file cut short", truncated),
        fault("the graph of another model", graph_of_another),
        fault("two derived graphs exchanged", derived_graph_of_another, "for cuda"),
        fault("a derived graph missing", file_missing, "for cuda"),
        fault("an engine of another model", engine_of_another, "for cuda"),
        fault("an engine of another graph, its record with it", engine_of_another_graph, "for cuda"),
        fault("the manifest's verdict edited", manifest_edited),
        fault("the manifest rewritten for another theta", manifest_rewritten, weight="rope_cos"),
        fault("a bundle of another checkpoint", other_checkpoint),
    ]


FAULTS: tuple[Fault, ...] = (
    *_weight_faults(),
    Fault("codes turned back whole", "numerics", "int4", turned_back_whole, weight=W1),
    *_routing_faults(),
    *_cache_faults(),
    *_numeric_faults(),
    *_session_faults(),
    *_file_faults(),
)
