"""The decoder taken apart: every part of it in order, and what goes in and comes out of each.

A part is the smallest piece that a fault can be pinned to: a norm, the projections of one layer, its rotation, the writing of
its cache, the attention itself, the projection behind it, the experts, the head. ``record`` lets the PyTorch decoder compute
part by part and keeps every value on the way; composed they are exactly ``Decoder.forward`` (a test asks so). Values have
names of their own, for graphs to be cut at (``graph_cuts``).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from motrt.model_def import operators
from motrt.model_def.config import ModelConfig
from motrt.model_def.decoder import Cache, Decoder
from motrt.model_def.layers import Layer
from motrt.model_def.signature import past_key, past_value, present_key, present_value
from motrt.runtime.step_inputs import StepInputs

LOGITS, HIDDEN = "logits", "hidden"

Values = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Part:
    """A piece of the decoder.

    Attributes:
        layer: of which it is a piece; None: of none.
        name: for people.
        inputs: the values that it reads, beside what the graph is given.
        outputs: the values that it makes.
        roundings: how many times in a row it rounds, for its budget.
    """

    layer: int | None
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    roundings: int

    @property
    def place(self) -> str:
        """The layer, in words."""
        return "outside the layers" if self.layer is None else f"layer {self.layer}"

    def __str__(self) -> str:
        return self.name if self.layer is None else f"layer {self.layer}, {self.name}"


def stream(layer: int) -> str:
    """The residual stream before ``layer``; before the layer behind the last one: what the final norm reads."""
    return f"stream.{layer}"


def of_layer(name: str, layer: int) -> str:
    """A value within a layer."""
    return f"{name}.{layer}"


def parts(config: ModelConfig) -> list[Part]:
    """All parts, in the order in which they compute."""
    found = [Part(None, "embedding", (), (stream(0),), 1)]
    for layer in range(config.num_layers):
        found += _parts_of_layer(layer, config.qk_norm)
    found.append(Part(None, "final norm", (stream(config.num_layers),), (HIDDEN,), 3))
    found.append(Part(None, "head", (HIDDEN,), (LOGITS,), 2))
    return found


def _parts_of_layer(layer: int, has_qk_norm: bool) -> list[Part]:
    def at(name: str) -> str:
        return of_layer(name, layer)

    heads = (at("query"), at("key"), at("value"))
    rotated, present = (at("rotated_query"), at("rotated_key")), (present_key(layer), present_value(layer))
    past = (past_key(layer), past_value(layer))
    return [
        Part(layer, "attention norm", (stream(layer),), (at("normed"),), 3),
        Part(layer, "q/k/v projections", (at("normed"),), heads, 5 if has_qk_norm else 2),
        Part(layer, "rotation", heads[:2], rotated, 3),
        Part(layer, "cache write", (rotated[1], heads[2], *past), present, 1),
        Part(layer, "attention", (rotated[0], *present), (at("mixed"),), 5),
        Part(layer, "output projection", (at("mixed"), stream(layer)), (at("attended"),), 3),
        Part(layer, "ffn norm", (at("attended"),), (at("ffn_normed"),), 3),
        Part(layer, "experts", (at("ffn_normed"), at("attended")), (stream(layer + 1),), 6),
    ]


def whole_layer(layer: int) -> Part:
    """One layer as one piece, for the drift from layer to layer."""
    inputs = (stream(layer), past_key(layer), past_value(layer))
    return Part(layer, "whole layer", inputs, (stream(layer + 1), present_key(layer), present_value(layer)), 12)


@torch.inference_mode()
def record(decoder: Decoder, inputs: StepInputs, cache: Cache) -> tuple[Values, Cache]:
    """One pass, every value kept.

    Args:
        decoder: what computes.
        inputs: of the pass.
        cache: per layer keys and values, each [b, k, t, d].

    Returns:
        Every value by name, past and present of the cache too, and the new cache.
    """
    ids, mask, position, index, predicted = (torch.from_numpy(one).to(decoder.device) for one in inputs.named().values())
    experts = decoder.route(mask.flatten(), len(decoder.config.modalities))
    at = decoder.positions(ids.shape[1], experts, position, cache)
    kept: dict[str, Tensor] = {}
    x = kept[stream(0)] = decoder.tok_embeddings(ids.flatten())
    present: Cache = []
    for number, (layer, (keys, values)) in enumerate(zip(cast(Iterable[Layer], decoder.layers), cache, strict=True)):
        attention = layer.attention
        normed = layer.attention_norm(x)
        query, key, value = attention.project(normed, at)
        turned_query, turned_key = attention.rotate(query, at), attention.rotate(key, at)
        new = operators.write_cache(keys, turned_key, position), operators.write_cache(values, value, position)
        mixed = attention.attend(turned_query, *new, at)
        attended = x + attention.give_out(mixed, at)
        ffn_normed = layer.ffn_norm(attended)
        x = attended + layer.feed_forward(ffn_normed, at.experts)
        names = ("normed", "query", "key", "value", "rotated_query", "rotated_key", "mixed", "attended", "ffn_normed")
        made = (normed, query, key, value, turned_query, turned_key, mixed, attended, ffn_normed)
        kept |= {of_layer(name, number): one for name, one in zip(names, made, strict=True)}
        kept |= {past_key(number): keys, past_value(number): values, stream(number + 1): x}
        kept |= {present_key(number): new[0], present_value(number): new[1]}
        present.append(new)
    kept[HIDDEN] = decoder.norm(x.index_select(0, index))
    kept[LOGITS] = decoder.logits(kept[HIDDEN], predicted)
    return {name: _as_numpy(one) for name, one in kept.items()}, present


def _as_numpy(value: Tensor) -> NDArray[Any]:
    exact = value if value.dtype in (torch.float32, torch.float64) else value.float()
    return np.ascontiguousarray(exact.cpu().numpy())


def first_without_numbers(found: Sequence[Part], values: Values) -> Part | None:
    """The first part that makes something else than numbers of what are numbers; None where none does."""
    for part in found:
        made = [values[name] for name in part.outputs]
        if part.outputs == (LOGITS,):
            made = [np.where(np.isneginf(one), 0.0, one) for one in made]  # ids outside the range are -inf on purpose
        if not all(np.isfinite(one).all() for one in made):
            return part
    return None
