"""The graphs that a model is exported as: the canonical one, and what is derived of it. Standard library alone.

Every graph computes the same decoder over the same cache. A derived graph knows more beforehand (which modality its tokens
are, which one it predicts, how many positions the cache holds), so it takes fewer inputs, reads fewer weights, and can be
compiled where the canonical one can not. What it leaves out is all that makes it differ: see ``Signature.of``.

``plan_for`` says which graphs a target is given. It is the one place that does: the exporter makes what stands in the plan,
the manifest carries it, and a session chooses from it for each pass.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

from motrt.errors import ConfigError
from motrt.model_def.config import ModelConfig
from motrt.model_def.parameters import Parameter, parameters

Target = Literal["onnx", "cuda", "tensorrt", "tensorrt-rtx"]
RoutingKind = Literal["gather", "select", "fixed"]
Operators = Literal["standard", "onnxruntime"]

OPERATORS: tuple[Operators, ...] = ("standard", "onnxruntime")
TARGETS: tuple[Target, ...] = ("onnx", "cuda", "tensorrt", "tensorrt-rtx")
ENGINE_TARGETS: tuple[Target, ...] = ("tensorrt", "tensorrt-rtx")


@dataclass(frozen=True)
class Graph:
    """One graph of a plan.

    Attributes:
        name: what its files are called.
        routing: how rows find their weights (see ``routing``); ``fixed`` where the modalities below are.
        tokens: the index of the modality that every token is of; None: as ``modality_mask`` says.
        predicts: the index of the modality that every row predicts; None: as ``head_mask`` says. Fixed as ``tokens`` is, for
            one new token per row.
        capacity: t, positions of the cache; None: as many as the buffers have.
        masked: whether attention is told which keys it sees by a mask. A step can be told their number instead, which lets
            onnxruntime on a GPU use kernels that take no mask (docs/decisions/0017).
        one_token: whether it takes one new token per row, as a step does, though of any modality.
        cuts_table: whether a step holds its own modality's rows of the embedding alone. An engine has a copy of what it reads;
            onnxruntime's sessions share one, and rows of the whole table cost nothing.
        operators: ``onnxruntime`` where it is written in that runtime's own operators, as far as there are such.
    """

    name: str = "model"
    routing: RoutingKind = "gather"
    tokens: int | None = None
    predicts: int | None = None
    capacity: int | None = None
    masked: bool = True
    one_token: bool = False
    cuts_table: bool = True
    operators: Operators = "standard"

    @property
    def is_step(self) -> bool:
        """Whether it takes one new token per row, of one modality, predicting one modality."""
        return self.tokens is not None

    @property
    def takes_one_token(self) -> bool:
        """Whether it takes one new token per row: its passes then all look alike, and can be recorded."""
        return self.is_step or self.one_token

    @property
    def file_name(self) -> str:
        return f"{self.name}.onnx"

    def parameters(self, config: ModelConfig) -> tuple[Parameter, ...]:
        """The weights that this graph reads, in the order of the forward pass."""
        if not self.is_step:
            return parameters(config)
        assert self.tokens is not None and self.predicts is not None
        here, there = config.modality_names[self.tokens], config.modality_names[self.predicts]
        return tuple(one for one in parameters(config) if one.modality in (None, there if one.part == "head" else here))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, for the manifest."""
        return {
            "name": self.name,
            "routing": self.routing,
            "tokens": self.tokens,
            "predicts": self.predicts,
            "capacity": self.capacity,
            "masked": self.masked,
            "one_token": self.one_token,
            "cuts_table": self.cuts_table,
            "operators": self.operators,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any], config: ModelConfig) -> "Graph":
        """What ``to_dict`` gave.

        Raises:
            ConfigError: when it is no graph of ``config``.
        """
        known = {one for target in TARGETS for how in OPERATORS for one in plan_for(target, config, how)}
        # What older manifests do not say.
        since = {"masked": True, "one_token": False, "cuts_table": True, "operators": "standard"}
        found = next((one for one in known if one.to_dict() == since | values), None)
        if found is None:
            raise ConfigError(f"{values!r} is no graph of this model and version")
        return found


CANONICAL = Graph()


def plan_for(target: Target, config: ModelConfig, operators: Operators = "standard") -> tuple[Graph, ...]:
    """The graphs of ``target`` beside the canonical one, most special first: a pass takes the first that serves it.

    - ``onnx``: none; the canonical graph serves every mix, and what is absent costs nothing.
    - ``cuda``: a step for every pair of modalities and one for rows of several, with no ``NonZero`` in them, which would wait
      for the host and forbid CUDA graphs; prompts go through the canonical graph. Attention knows the number of keys, and needs
      no mask. These can be written in onnxruntime's own operators.
    - ``tensorrt``, ``tensorrt-rtx``: the same steps, and a graph for prompts and mixed batches that gathers nothing by value,
      which TensorRT can not parse. Their caches hold the model's maximum, since TensorRT wants to know it beforehand.
    """
    capacity = config.max_seq_len
    steps = (*_decode_steps(config, capacity), *_change_overs(config, capacity))
    several = (Graph("decode.mixed", "select", capacity=capacity, one_token=True),) if len(config.modalities) > 1 else ()
    unmasked = tuple(replace(step, masked=False, cuts_table=False, operators=operators) for step in (*steps, *several))
    prompts = Graph("prefill", "select", capacity=capacity)
    return {"onnx": (), "cuda": unmasked, "tensorrt": (*steps, prompts), "tensorrt-rtx": (*steps, prompts)}[target]


def _decode_steps(config: ModelConfig, capacity: int) -> tuple[Graph, ...]:
    """One more token of the modality that is being spoken."""
    return tuple(
        Graph(f"decode.{name}", "fixed", tokens=index, predicts=index, capacity=capacity)
        for index, name in enumerate(config.modality_names)
    )


def _change_overs(config: ModelConfig, capacity: int) -> tuple[Graph, ...]:
    """The last token of one modality, predicting the first of another."""
    names = config.modality_names
    return tuple(
        Graph(f"change.{names[here]}.{names[there]}", "fixed", tokens=here, predicts=there, capacity=capacity)
        for here in range(len(names))
        for there in range(len(names))
        if here != there
    )
