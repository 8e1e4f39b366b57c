"""Does the gate see what it is there to see? Faults planted into real bundles, and what caught each.

    .venv/bin/python benchmarks/planted_faults.py --json benchmarks/results/planted_faults.json --markdown docs/gate.md

Each fault is put into a copy of a bundle that the exporter made, which then vouches for itself again: hashes alone would
catch any change of a file, and say nothing of the ladder. The copy is verified as ``motrt verify --bisect`` verifies it.
Faults of files are the other way round: there the hashes are what must catch them. Leaves with 1 where a fault was not
caught, or placed wrongly.
"""

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from onnx import TensorProto, helper
from rich.console import Console
from rich.progress import track

from motrt.benchmarks.builds import Build, traces_shared
from motrt.benchmarks.doctored import Doctored, Value
from motrt.benchmarks.document import leave, machine
from motrt.errors import MotrtError
from motrt.export.bundle_from_checkpoint import QuantizeOptions
from motrt.export.parity.findings import Outcome, Report
from motrt.export.parity.gate import climb_session
from motrt.export.report import table
from motrt.export.steps import Steps
from motrt.export.verification import VerifyOptions, verify_bundle
from motrt.model_def.checkpoint.native import open_checkpoint
from motrt.model_def.config import Modality, ModelConfig, SwigluExpert
from motrt.model_def.operators import rope_tables
from motrt.model_def.signature import MODALITY_MASK
from motrt.runtime.bundle import MODEL_FILE, WEIGHTS_FILE, open_bundle
from motrt.runtime.kv_cache import KVCache
from motrt.runtime.onnx_session import OnnxSession
from motrt.runtime.session import Logits, Session
from motrt.runtime.step_inputs import StepInputs

TINY = ModelConfig.tiny()
# Experts of one kind and size, with biases, so that they can be swapped.
EQUAL = TINY.replace(
    modalities=(Modality("text", 96, SwigluExpert(96, bias=True)), Modality("audio", 32, SwigluExpert(96, bias=True)))
)
TIED = TINY.replace(head="shared", tied_embeddings=True, routed_attention=False)

BUILDS = {
    "fp32": Build(TINY),
    "fp16": Build(TINY, "fp16"),
    "equal experts": Build(EQUAL),
    "tied head": Build(TIED),
    "int4": Build(TINY, "int4"),
    "int4, zero points": Build(TINY, "int4", options=QuantizeOptions(symmetric=False)),
    # Activations of the first layer's text expert leave what float16 holds; as numbers of float32 they are nothing special.
    "fp16, outliers": Build(
        TINY,
        "fp16",
        scaled=(
            ("layers.0.feed_forward.text.w1", 400.0),
            ("layers.0.feed_forward.text.w3", 400.0),
            ("layers.0.feed_forward.text.w2", 1e-4),
        ),
    ),
}

Plant = Callable[[Doctored], None]


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        kind: weights, routing, cache, numerics, files or session.
        name: what is wrong.
        build: the bundle that it is planted in.
        plant: plants it.
        place: where bisect must say that it is: words of its sentence; empty where it has no place in the graph.
    """

    kind: str
    name: str
    build: str
    plant: Any
    place: str = ""


@dataclass(frozen=True)
class Told:
    """What became of one fault."""

    fault: Fault
    rungs: tuple[str, ...]
    said: str

    @property
    def is_caught(self) -> bool:
        return bool(self.rungs)

    @property
    def is_placed(self) -> bool:
        return not self.fault.place or self.fault.place in self.said

    def named(self) -> tuple[str, str, str]:
        return self.fault.kind, self.fault.name, ", ".join(self.rungs) or "nothing"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        fault = self.fault
        named = {"kind": fault.kind, "fault": fault.name, "bundle": fault.build, "expected": fault.place}
        return {**named, "caught_by": list(self.rungs), "placed": self.is_placed, "said": self.said}


# Faults of weights.


def of_weight(name: str, change: Callable[[Value], Value]) -> Plant:
    return lambda one: one.change(name, change)


def with_row(value: Value) -> Value:
    value[3] = -value[3]
    return value


def with_element(value: Value) -> Value:
    place = np.unravel_index(np.abs(value).argmax(), value.shape)
    value[place] *= -1
    return value


def with_block(value: Value) -> Value:
    value[0, 0] *= 2
    return value


def with_step(value: Value) -> Value:
    value[0, 0] += 1
    return value


def swap_experts(one: Doctored) -> None:
    for name in one.names("layers.0.feed_forward.text."):
        one.exchange(name, name.replace(".text.", ".audio."))


def swap_layers(one: Doctored) -> None:
    for name in one.names("layers.0."):
        one.exchange(name, name.replace("layers.0.", "layers.1."))


def rotate_with(change: Callable[[ModelConfig], ModelConfig]) -> Plant:
    def plant(one: Doctored) -> None:
        changed = change(one.config)
        cos, sin = rope_tables(changed.rope, changed.head_size, changed.max_seq_len, torch.float32)
        one.set_weight("rope_cos", cos.numpy())
        one.set_weight("rope_sin", sin.numpy())

    return plant


def set_attribute(op_type: str, start: str, name: str, value: Any, number: int = 0) -> Plant:
    def plant(one: Doctored) -> None:
        node = one.node(op_type, start, number)
        kept = [attribute for attribute in node.attribute if attribute.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute(name, value)])

    return plant


def stale_head(one: Doctored) -> None:
    """The head of a tied model is a copy that was taken before the table was trained on."""
    head = next(node for node in one.model.graph.node if "tok_embeddings.weight" in node.input and node.op_type != "Gather")
    stale = np.roll(one.weight("tok_embeddings.weight"), 1, axis=1)
    place = list(head.input).index("tok_embeddings.weight")
    head.input[place] = one.constant(stale, "float32")


def unlike_twin(source: str, target: str) -> Plant:
    return lambda one: one.set_weight(target, one.weight(source))


WEIGHTS = [
    Fault("weights", "experts of one layer swapped", "equal experts", swap_experts, "layer 0, experts"),
    Fault(
        "weights",
        "a square weight transposed",
        "fp32",
        of_weight("layers.0.attention.wo.text.weight", lambda w: w.T.copy()),
        "layer 0, output projection, text",
    ),
    Fault(
        "weights",
        "one row with the other sign",
        "fp32",
        of_weight("layers.0.feed_forward.text.w1.weight", with_row),
        "layer 0, experts, text",
    ),
    Fault(
        "weights",
        "one element with the other sign",
        "fp32",
        of_weight("layers.1.attention.wv.audio.weight", with_element),
        "layer 1, q/k/v projections, audio",
    ),
    Fault(
        "weights",
        "a bias of one layer dropped",
        "fp32",
        of_weight("layers.1.feed_forward.audio.fc1.bias", np.zeros_like),
        "layer 1, experts, audio",
    ),
    Fault(
        "weights",
        "a layer's bias taken from another",
        "equal experts",
        unlike_twin("layers.0.feed_forward.text.w2.bias", "layers.1.feed_forward.text.w2.bias"),
        "layer 1, experts, text",
    ),
    Fault(
        "weights",
        "keys and values projected by each other's weights",
        "fp32",
        lambda one: one.exchange("layers.0.attention.wk.text.weight", "layers.0.attention.wv.text.weight"),
        "layer 0, q/k/v projections, text",
    ),
    Fault("weights", "two layers in each other's place", "fp32", swap_layers, "layer 0, attention norm"),
    Fault(
        "weights",
        "one layer's projection used twice",
        "fp32",
        unlike_twin("layers.0.attention.wo.audio.weight", "layers.1.attention.wo.audio.weight"),
        "layer 1, output projection, audio",
    ),
    Fault(
        "weights",
        "embedding shifted by one row",
        "fp32",
        of_weight("tok_embeddings.weight", lambda w: np.roll(w, 1, axis=0)),
        "embedding",
    ),
    Fault("weights", "a tied head that is stale", "tied head", stale_head, "head"),
    Fault(
        "weights", "a norm's weight dropped", "fp32", of_weight("layers.1.ffn_norm.weight", np.ones_like), "layer 1, ffn norm"
    ),
    Fault(
        "weights", "the final norm is a layer's", "fp32", unlike_twin("layers.1.ffn_norm.weight", "norm.weight"), "final norm"
    ),
    Fault(
        "weights",
        "norm's epsilon 1e-2 for 1e-5",
        "fp32",
        set_attribute("RMSNormalization", "layers.1.attention_norm", "epsilon", 1e-2),
        "layer 1, attention norm",
    ),
    Fault(
        "weights",
        "norm's epsilon 1e-4 for 1e-5",
        "fp32",
        set_attribute("RMSNormalization", "layers.0.ffn_norm", "epsilon", 1e-4),
        "layer 0, ffn norm",
    ),
    Fault(
        "weights",
        "halves rotated for pairs",
        "fp32",
        set_attribute("RotaryEmbedding", "layers.0.attention", "interleaved", 0),
        "layer 0, rotation",
    ),
    Fault(
        "weights",
        "theta 10000 for 500000",
        "fp32",
        rotate_with(lambda config: config.replace(rope=replace(config.rope, theta=10_000.0))),
        "layer 0, rotation",
    ),
    Fault(
        "weights",
        "int4: scale of one block doubled",
        "int4",
        of_weight("layers.0.feed_forward.text.w2.weight.scales", with_block),
        "layer 0, experts, text",
    ),
    Fault(
        "weights",
        "int4: codes shifted by one output",
        "int4",
        of_weight("layers.1.attention.wo.audio.weight.codes", lambda w: np.roll(w, 1, axis=1)),
        "layer 1, output projection, audio",
    ),
    Fault(
        "weights",
        "int4: one code one step off",
        "int4",
        of_weight("layers.0.feed_forward.audio.fc1.weight.codes", with_step),
        "",
    ),
    Fault(
        "weights",
        "int4: one zero point one step off",
        "int4, zero points",
        of_weight("layers.1.feed_forward.audio.fc2.weight.zero_points", with_step),
        "",
    ),
    Fault("weights", "int8 table: one row's scale doubled", "int4", of_weight("tok_embeddings.weight.scales", with_block), ""),
]


# Faults of routing.


def flip_mask(one: Doctored) -> None:
    one.behind(MODALITY_MASK, lambda mask: one.make("Sub", one.constant(1), mask))


def shift_mask(one: Doctored) -> None:
    """Every position takes the route of its neighbour."""

    def shifted(mask: str) -> str:
        last = one.make("Slice", mask, one.constant([-1]), one.constant([1 << 30]), one.constant([1]))
        others = one.make("Slice", mask, one.constant([0]), one.constant([-1]), one.constant([1]))
        return one.make("Concat", last, others, axis=1)

    one.behind(MODALITY_MASK, shifted)


def head_by_token(one: Doctored) -> None:
    """The head follows the modality of the token, and not of what is predicted."""
    flat = one.make("Reshape", MODALITY_MASK, one.constant([-1]))
    picked = one.make("Gather", flat, "logits_index", axis=0)
    for node in list(one.model.graph.node):
        if "head_mask" in node.input and node.op_type == "Equal":
            node.input[:] = [picked if name == "head_mask" else name for name in node.input]


def cross_experts(one: Doctored) -> None:
    """In layer 1 each expert is given the other's rows, and they are laid where its own should be."""
    first, second = one.node("Gather", "layers.1.feed_forward"), one.node("Gather", "layers.1.feed_forward", 1)
    rows = first.input[1], second.input[1]
    first.input[1], second.input[1] = rows[1], rows[0]
    laid = one.node("Concat", "layers.1.feed_forward")
    laid.input[:] = [laid.input[1], laid.input[0]]


def not_put_back(one: Doctored) -> None:
    """Rows stay sorted by modality after the experts of layer 0."""
    placed = one.node("Gather", "layers.0.feed_forward", 2)
    one.behind(placed.output[0], lambda value: one.make("Identity", placed.input[0]))


def of_logits(token: int, value: float, only_where: str) -> Plant:
    """One id's logit is ``value``, in rows where it is finite or in those where it is not."""

    def plant(one: Doctored) -> None:
        chosen = np.zeros((1, one.config.vocab_size), bool)
        chosen[0, token] = True

        def changed(logits: str) -> str:
            rows = one.make("IsInf", logits)
            wanted = rows if only_where == "-inf" else one.make("Not", rows)
            here = one.make("And", wanted, one.constant(chosen, "bool"))
            return one.make("Where", here, one.constant(np.float32(value), "float32"), logits)

        one.behind("logits", changed)

    return plant


def roll_head(name: str) -> Plant:
    return of_weight(name, lambda w: np.roll(w, 1, axis=0))


TEXT, AUDIO = TINY.id_ranges

ROUTING = [
    Fault("routing", "mask flipped", "fp32", flip_mask, "layer 0, q/k/v projections"),
    Fault("routing", "mask flipped, experts alike", "equal experts", flip_mask, "layer 0, q/k/v projections"),
    Fault("routing", "mask shifted by one", "fp32", shift_mask, "layer 0, q/k/v projections"),
    Fault("routing", "experts right, head by the token's modality", "fp32", head_by_token, "head"),
    Fault("routing", "one layer's experts given each other's rows", "fp32", cross_experts, "layer 1, experts"),
    Fault("routing", "rows not put back behind one layer's experts", "fp32", not_put_back, "layer 0, experts"),
    Fault("routing", "text head shifted by one id", "fp32", roll_head("output.text.weight"), "head, text"),
    Fault("routing", "audio head shifted by one id", "fp32", roll_head("output.audio.weight"), "head, audio"),
    Fault("routing", "filter lets the first audio id into text", "fp32", of_logits(AUDIO.start, 0.0, "-inf"), "head"),
    Fault("routing", "filter lets the last text id into audio", "fp32", of_logits(TEXT.stop - 1, 0.0, "-inf"), "head"),
    Fault("routing", "filter drops the last text id", "fp32", of_logits(TEXT.stop - 1, -np.inf, "finite"), "head"),
    Fault("routing", "filter drops the first audio id", "fp32", of_logits(AUDIO.start, -np.inf, "finite"), "head"),
]


# Faults of the cache.


def scatter(one: Doctored, layer: int, values: bool = False) -> Any:
    return one.node("TensorScatter", f"layers.{layer}.attention", int(values))


def write_elsewhere(layer: int, change: Callable[[Doctored, str], str], values: bool = False) -> Plant:
    return lambda one: one.read_instead(scatter(one, layer, values), 2, lambda place: change(one, place))


def roll_rows(one: Doctored) -> None:
    def rolled(update: str) -> str:
        last = one.make("Slice", update, one.constant([-1]), one.constant([1 << 30]), one.constant([0]))
        others = one.make("Slice", update, one.constant([0]), one.constant([-1]), one.constant([0]))
        return one.make("Concat", last, others, axis=0)

    one.read_instead(scatter(one, 0, values=True), 1, rolled)


def not_written(layer: int) -> Plant:
    """The value cache of one layer stays as it was: what is written is its own first column again."""

    def plant(one: Doctored) -> None:
        node = scatter(one, layer, values=True)
        zero = one.constant(0.0, "float32")
        one.read_instead(node, 1, lambda update: one.make("Mul", update, zero))

    return plant


def stale_last(one: Doctored) -> None:
    """The newest key is not written: the pass's last column holds the one before it."""

    def stale(update: str) -> str:
        first = one.make("Slice", update, one.constant([0]), one.constant([1]), one.constant([2]))
        others = one.make("Slice", update, one.constant([0]), one.constant([-1]), one.constant([2]))
        return one.make("Concat", first, others, axis=2)

    one.read_instead(scatter(one, 1), 1, stale)


def swap_keys_and_values(one: Doctored) -> None:
    keys, values = scatter(one, 0), scatter(one, 0, values=True)
    keys.input[1], values.input[1] = values.input[1], keys.input[1]


def rotate_from_zero(one: Doctored) -> None:
    """Positions of the rotation start anew in each pass."""
    nodes = one.nodes("RotaryEmbedding")
    start = one.make("Unsqueeze", "cache_position", one.constant([1]))
    fresh = one.make("Sub", nodes[0].input[3], start)
    for node in nodes:
        node.input[3] = fresh


def see(change: str) -> Plant:
    """What a token sees: ``itself not``, or ``the next one too``."""

    def plant(one: Doctored) -> None:
        compare = one.node("LessOrEqual")
        if change == "itself not":
            compare.op_type = "Less"
        else:
            one.read_instead(compare, 1, lambda columns: one.make("Add", columns, one.constant(1)))

    return plant


def see_all(one: Doctored) -> None:
    """Padding and whatever else stands in the buffer is seen."""
    one.read_instead(one.node("Attention", "layers.0.attention"), 3, lambda mask: one.make("Or", mask, one.make("Not", mask)))


def roll_heads(one: Doctored) -> None:
    """Each query head attends over its neighbour's keys."""
    order = one.constant([*range(1, one.config.num_heads), 0])
    one.read_instead(one.node("Attention", "layers.1.attention"), 0, lambda query: one.make("Gather", query, order, axis=1))


CACHE = [
    Fault(
        "cache",
        "keys written one place early",
        "fp32",
        write_elsewhere(0, lambda one, at: one.make("Max", one.make("Sub", at, one.constant(1)), one.constant(0))),
        "layer 0, cache write",
    ),
    Fault(
        "cache",
        "values written always at the start",
        "fp32",
        write_elsewhere(1, lambda one, at: one.make("Mul", at, one.constant(0)), values=True),
        "layer 1, cache write",
    ),
    Fault(
        "cache",
        "positions from 20 on written at 20",
        "fp32",
        write_elsewhere(0, lambda one, at: one.make("Min", at, one.constant(20))),
        "layer 0, cache write",
    ),
    Fault("cache", "a row's values written into another's", "fp32", roll_rows, "layer 0, cache write"),
    Fault("cache", "the newest key stale", "fp32", stale_last, "layer 1"),
    Fault("cache", "values of one layer not written", "fp32", not_written(1), "layer 1"),
    Fault("cache", "keys and values in each other's place", "fp32", swap_keys_and_values, "layer 0"),
    Fault("cache", "rotation forgets what the cache holds", "fp32", rotate_from_zero, "layer 0, rotation"),
    Fault("cache", "a token does not see itself", "fp32", see("itself not"), "layer 0, attention"),
    Fault("cache", "a token sees the next one", "fp32", see("the next one too"), "layer 0, attention"),
    Fault("cache", "padding and stale slots are seen", "fp32", see_all, "layer 0, attention"),
    Fault("cache", "query heads attend over their neighbours' keys", "fp32", roll_heads, "layer 1"),
]


# Faults of numerics.


def through(value: Callable[[Doctored], str], kind: int) -> Plant:
    return lambda one: one.behind(value(one), one.through(kind))


def twice_added(one: Doctored) -> None:
    node = one.node("Add", "layers.0/")
    one.read_instead(node, 1, lambda attended: one.make("Add", attended, node.input[0]))


def dropped(one: Doctored) -> None:
    node = one.node("Add", "layers.1/", 1)
    one.read_instead(node, 0, lambda stream: one.make("Mul", stream, one.constant(0.0, "float32")))


def other_gate(one: Doctored) -> None:
    """A gate of sigmoid(1.702 x), as some take for another activation."""
    node = one.node("Sigmoid", "layers.0.feed_forward.text")
    one.read_instead(node, 0, lambda value: one.make("Mul", value, one.constant(1.702, "float32")))


def scaled_scores(factor: float) -> Plant:
    return lambda one: set_attribute("Attention", "layers.1.attention", "scale", factor * one.config.head_size**-0.5)(one)


NUMERICS = [
    Fault("numerics", "an activation leaves float16", "fp16, outliers", lambda one: None, "layer 0, experts"),
    Fault(
        "numerics",
        "one product through float16",
        "fp32",
        through(lambda one: one.node("Gemm", "layers.1.feed_forward.text.w1").output[0], TensorProto.FLOAT16),
        "layer 1, experts, text",
    ),
    Fault(
        "numerics",
        "one product through bfloat16",
        "fp32",
        through(lambda one: one.node("Gemm", "layers.0.attention.wo.audio").output[0], TensorProto.BFLOAT16),
        "layer 0, output projection, audio",
    ),
    Fault("numerics", "logits through float16", "fp32", through(lambda one: "logits", TensorProto.FLOAT16), "head"),
    Fault(
        "numerics",
        "approximate GELU",
        "fp32",
        set_attribute("Gelu", "layers.0.feed_forward.audio", "approximate", "tanh"),
        "layer 0, experts, audio",
    ),
    Fault("numerics", "another gate", "fp32", other_gate, "layer 0, experts, text"),
    Fault("numerics", "softmax scale off by the root of two", "fp32", scaled_scores(2**0.5), "layer 1, attention"),
    Fault("numerics", "softmax scale off by a hundredth", "fp32", scaled_scores(1.01), "layer 1, attention"),
    Fault("numerics", "residual added twice", "fp32", twice_added, "layer 0, output projection"),
    Fault("numerics", "residual dropped", "fp32", dropped, "layer 1, experts"),
]


# Faults of files: what the hashes are for. ``plant`` changes a folder whose manifest stays as it is.


def change_file(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path, Path], None]:
    def plant(folder: Path, other: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return plant


def from_other(name: str) -> Callable[[Path, Path], None]:
    def plant(folder: Path, other: Path) -> None:
        (folder / name).write_bytes((other / name).read_bytes())

    return plant


def flip_a_bit(data: bytes) -> bytes:
    changed = bytearray(data)
    changed[len(changed) // 2] ^= 1
    return bytes(changed)


FILES = [
    Fault("files", "one bit of the weights flipped", "fp32", change_file(WEIGHTS_FILE, flip_a_bit)),
    Fault("files", "one bit of the graph flipped", "fp32", change_file(MODEL_FILE, flip_a_bit)),
    Fault("files", "the weights cut short", "fp32", change_file(WEIGHTS_FILE, lambda data: data[:-1])),
    Fault("files", "another model's weights", "fp32", from_other(WEIGHTS_FILE)),
    Fault(
        "files", "the manifest edited", "fp32", change_file("manifest.json", lambda data: data.replace(b'"fp32"', b'"fp16"', 1))
    ),
    Fault("files", "another model's engine", "engines", from_other("decode.text.tensorrt-rtx.engine")),
]


# Faults of sessions: the file is right, and what runs it is not.


class LosesWhenGrowing(OnnxSession):
    """A key is gone when the cache grows."""

    def grow_buffers(self, buffers: Any, capacity: int) -> Any:
        grown = super().grow_buffers(buffers, capacity)
        for array in grown.arrays():
            array[:, :, 5] = 0
        return grown


class RowsMixed(OnnxSession):
    """Two rows of a batch get each other's logits."""

    def execute(self, inputs: StepInputs, cache: KVCache) -> Logits:
        logits = super().execute(inputs, cache)
        same = cache.batch_size > 1 and len(logits) > 1 and inputs.head_mask[0] == inputs.head_mask[-1]
        return logits[::-1].copy() if same else logits


class OffByOneInDecode(OnnxSession):
    """Decode steps stand one place early."""

    def execute(self, inputs: StepInputs, cache: KVCache) -> Logits:
        is_step = inputs.input_ids.shape[1] == 1 and int(inputs.cache_position.min()) > 0
        place = inputs.cache_position - 1 if is_step else inputs.cache_position
        return super().execute(replace(inputs, cache_position=place), cache)


class OtherTokens(OnnxSession):
    """Streaming says another token than was chosen."""

    def generate(self, *arguments: Any, **named: Any) -> Iterator[Any]:
        for step in super().generate(*arguments, **named):
            yield replace(step, token_id=self.config.id_ranges[0].start) if step.index == 5 else step


OUTSIDE = "the fault is outside the graph"

SESSIONS = [
    Fault("session", "growing the cache loses a key", "fp32", LosesWhenGrowing, OUTSIDE),
    Fault("session", "rows of a batch mixed up", "fp32", RowsMixed, OUTSIDE),
    Fault("session", "decode steps one place early", "fp32", OffByOneInDecode, OUTSIDE),
    Fault("session", "streaming says another token", "fp32", OtherTokens, OUTSIDE),
]

FAULTS = (*WEIGHTS, *ROUTING, *CACHE, *NUMERICS, *FILES, *SESSIONS)


class Bench:
    """Bundles, made when they are first wanted, and the verdict on each fault.

    Args:
        folder: where everything goes.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[str, Path] = {}

    def bundle(self, name: str, seed: int = 0) -> Path:
        key = f"{name}, seed {seed}"
        if key not in self._made:
            folder = self._folder / f"bundle-{len(self._made)}"
            folder.mkdir()
            self._made[key] = replace(BUILDS[name], seed=seed).make(folder)
        return self._made[key]

    def engines(self, seed: int) -> Path:
        """A bundle with engines for a GPU that need not be here."""
        from motrt.export.bundle_from_checkpoint import export_bundle
        from motrt.export.engine_from_onnx import EngineOptions

        key = f"engines, seed {seed}"
        if key not in self._made:
            folder = self._folder / f"engines-{seed}"
            folder.mkdir()
            Build(TINY, seed=seed).write_checkpoint(folder / "checkpoint")
            options = EngineOptions("tensorrt-rtx", compute_capabilities=("8.9",))
            export_bundle(
                folder / "checkpoint", folder / "bundle", "fp16", verify=False, target="tensorrt-rtx", engine_options=options
            )
            self._made[key] = folder / "bundle"
        return self._made[key]

    def ask(self, fault: Fault) -> Told:
        """Plant it, and ask the gate."""
        if fault.kind == "files":
            return self._ask_of_files(fault)
        if fault.kind == "session":
            return self._ask_of_session(fault)
        bundle = self.bundle(fault.build)
        copy = Doctored(bundle, self._folder / "planted")
        try:
            fault.plant(copy)
            report = verify_bundle(copy.vouch(), bundle.parent / "checkpoint", options=VerifyOptions(bisect=True))
        finally:
            shutil.rmtree(copy.folder)
        return Told(fault, _failed(report), str(report.evidence["bisect"]["sentence"]))

    def _ask_of_files(self, fault: Fault) -> Told:
        make = self.engines if fault.build == "engines" else lambda seed: self.bundle(fault.build, seed)
        folder = Path(shutil.copytree(make(0), self._folder / "planted"))
        try:
            fault.plant(folder, make(1))
            verify_bundle(folder)
        except MotrtError as refusal:
            return Told(fault, ("hash",), str(refusal).splitlines()[-1].strip(" -"))
        finally:
            shutil.rmtree(folder)
        return Told(fault, (), "")

    def _ask_of_session(self, fault: Fault) -> Told:
        bundle = open_bundle(self.bundle(fault.build))
        checkpoint = open_checkpoint(bundle.path.parent / "checkpoint")

        def opened() -> Session:
            session: Session = fault.plant(bundle.model_path, bundle.config)
            return session

        report = climb_session(opened, bundle.config, checkpoint, Steps(), {})
        told = verify_bundle(bundle.path, checkpoint.path, options=VerifyOptions(bisect=True))
        return Told(fault, _failed(report), str(told.evidence["bisect"]["sentence"]))


def _failed(report: Report) -> tuple[str, ...]:
    return tuple(dict.fromkeys(one.rung for one in report.findings if one.outcome is Outcome.FAIL))


def as_markdown(told: list[Told]) -> str:
    """The table for the docs."""
    lines = ["| | fault | planted in | caught by | bisect says |", "|---|---|---|---|---|"]
    for one in told:
        caught = ", ".join(one.rungs) or "**nothing**"
        said = (
            one.said
            if one.fault.kind == "files"
            else one.said.split(":")[0]
            if one.fault.place != OUTSIDE
            else "outside the graph"
        )
        if not one.fault.place and one.fault.kind != "files":
            said = "(below what a part's roundings may do)" if one.said.startswith("every part") else said
        lines.append(f"| {one.fault.kind} | {one.fault.name} | {one.fault.build} | {caught} | {said} |")
    return "\n".join(lines)


BEGIN, END = "<!-- planted faults -->", "<!-- end of planted faults -->"


def put_between(file: Path, begin: str, end: str, text: str) -> None:
    """``text`` in the place of what stands between two marks of a file."""
    whole = file.read_text(encoding="utf-8")
    before, _, rest = whole.partition(begin)
    _, _, behind = rest.partition(end)
    file.write_text(f"{before}{begin}\n\n{text}\n\n{end}{behind}", encoding="utf-8")


@click.command()
@click.option("--json", "json_file", type=click.Path(path_type=Path))
@click.option("--markdown", type=click.Path(path_type=Path), help="Write the table between the marks of this file.")
@click.option("--only", help="Faults whose name holds this.")
def main(json_file: Path | None, markdown: Path | None, only: str | None) -> None:
    """Plant every fault and ask the gate; one JSON document last."""
    console = Console(stderr=True)
    torch.set_num_threads(1)
    chosen = [one for one in FAULTS if not only or only in one.name]
    with tempfile.TemporaryDirectory() as folder, traces_shared():
        bench = Bench(Path(folder))
        told = [bench.ask(one) for one in track(chosen, "plant", console=console, disable=not console.is_terminal)]
    rows = [
        (one.fault.kind, one.fault.name, ", ".join(one.rungs), "" if one.is_placed else one.fault.place, one.said)
        for one in told
    ]
    console.print(table("planted faults", ["kind", "fault", "caught by", "not placed at", "bisect says"], rows))
    missed, astray = [one for one in told if not one.is_caught], [one for one in told if not one.is_placed]
    if markdown is not None:
        above_p1 = sum(1 for one in told if set(one.rungs) - {"P1", "hash"})
        placed = [one for one in told if one.fault.place]
        counts = (
            f"{len(told)} faults, {len(told) - len(missed)} caught; {len(placed)} have a place, and "
            f"{sum(one.is_placed for one in placed)} of these were placed rightly. {above_p1} are caught by what is computed, "
            "and not by comparing weights and operators alone."
        )
        put_between(markdown, BEGIN, END, f"{counts}\n\n{as_markdown(told)}")
    leave({"machine": machine("motrt", "onnxruntime", "torch"), "faults": [one.to_dict() for one in told]}, json_file)
    sys.exit(1 if missed or astray else 0)


if __name__ == "__main__":
    main()
