"""Which weights are stored in fewer bits, and how. Standard library alone: the arithmetic is ``export/quantize.py``.

A quantised weight is whole numbers (*codes*) and, for every block of inputs of every output, one number (*scale*) that turns
them back: ``weight = (code - zero point) * scale``. Only how weights are stored changes; what a graph computes with is said by
its precision, as ever. Norms and biases are never quantised: they are few, and every row goes through them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any, Literal, cast

from motrt.errors import ConfigError, InputError, raise_all
from motrt.model_def.config import ModelConfig
from motrt.model_def.parameters import SHARED_HEAD, Parameter, is_hidden_product, layer_of, parameters, together_name

Stored = Literal["int8", "int4", "fp8", "fp16"]
Scales = Literal["absmax", "search"]
Calibration = Literal["none", "sampled", "file"]

STORED: tuple[Stored, ...] = ("int8", "int4", "fp8", "fp16")
SCALES: tuple[Scales, ...] = ("absmax", "search")
CALIBRATIONS: tuple[Calibration, ...] = ("none", "sampled", "file")
QUANTIZED_PARTS = ("attention", "expert", "head", "embedding")

# The weights of an expert that multiply its hidden activations: what a nonlinearity gave, a few channels of which are large.
HIDDEN = "hidden"
_SELECTED_PARTS = (*QUANTIZED_PARTS, HIDDEN)

# In models narrower than this both types lose more, since in sums of few products fewer errors cancel: they have smaller
# blocks, under which a CPU rounds activations too. int4 has 8 bits where 4 lose most: in the head, in what reads hidden
# activations, and, where that is a small share of the model, in the first and the last layer (docs/decisions/0025).
NARROW_WIDTH, NARROW_BLOCK_SIZE, FEWEST_LAYERS_WITH_EDGES = 1024, 32, 10

# The greatest code on either side of zero. fp8 is e4m3 without infinities, whose greatest number is 448.
CODE_RANGE: dict[str, tuple[int, int]] = {"int8": (-128, 127), "int4": (-8, 7), "fp8": (-448, 448)}
BITS = {"int8": 8, "int4": 4, "fp8": 8, "fp16": 16}

# onnxruntime and TensorRT have kernels for blocks of these sizes.
BLOCK_SIZES = (16, 32, 64, 128, 256)
USUAL_BLOCK_SIZE = 128

# What onnxruntime cuts an output's inputs into where they share one scale.
SMALLEST_FUSED_BLOCK = 32


@dataclass(frozen=True)
class WeightFormat:
    """How one weight is stored.

    Attributes:
        stored: element type: ``int8``, ``int4`` or ``fp8`` codes, or plain ``fp16`` numbers (the embedding table alone).
        block_size: inputs that share a scale; None: all inputs of an output.
        symmetric: whether zero is code 0; else every block has a zero point.
    """

    stored: Stored
    block_size: int | None = None
    symmetric: bool = True

    def __post_init__(self) -> None:
        raise_all(ConfigError, f"a weight can not be stored as {self}:", self.problems())

    def problems(self) -> list[str]:
        problems = []
        if self.stored not in STORED:
            problems.append(f"the type must be one of {', '.join(STORED)} ({self.stored!r} came)")
        if self.block_size is not None and self.block_size not in BLOCK_SIZES:
            problems.append(f"block_size must be one of {', '.join(map(str, BLOCK_SIZES))}, or None ({self.block_size!r} came)")
        symmetric: object = self.symmetric
        if not isinstance(symmetric, bool):
            problems.append(f"symmetric must be true or false ({self.symmetric!r} came)")
        if self.stored in ("fp8", "fp16") and self.symmetric is False:
            problems.append(f"{self.stored} has a zero of its own, and takes no zero point")
        if self.stored == "fp16" and self.block_size is not None:
            problems.append("fp16 has no scales, and so no blocks")
        return problems

    @property
    def is_coded(self) -> bool:
        """Whether it is codes and scales, and not plain numbers."""
        return self.stored in CODE_RANGE

    def num_blocks(self, width: int) -> int:
        """Scales of one output that has ``width`` inputs."""
        return 1 if self.block_size is None else width // self.block_size

    def num_bytes(self, parameter: Parameter, scale_bytes: int) -> int:
        """Bytes of codes, scales and zero points."""
        if not self.is_coded:
            return parameter.numel * BITS[self.stored] // 8
        out, width = parameter.shape
        num_scales = out * self.num_blocks(width)
        zero_points = 0 if self.symmetric else num_scales * BITS[self.stored] // 8
        return parameter.numel * BITS[self.stored] // 8 + num_scales * scale_bytes + zero_points

    def __str__(self) -> str:
        if self.stored == "fp16":
            return self.stored
        blocks = "a scale per output" if self.block_size is None else f"blocks of {self.block_size}"
        return f"{self.stored}, {blocks}{'' if self.symmetric else ', with zero points'}"


@dataclass(frozen=True)
class CodedWeight:
    """One set of codes and scales: of one weight, or of several that multiply the same rows, their outputs one after another.

    Attributes:
        name: that its initializers are called by.
        parts: the weights that it holds.
        how: their format.
        is_tied: whether it is the embedding of a model whose head is tied to it: rows are gathered, and multiplied by.
    """

    name: str
    parts: tuple[Parameter, ...]
    how: WeightFormat
    is_tied: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in] of all parts together."""
        return sum(one.shape[0] for one in self.parts), self.parts[0].shape[1]

    @property
    def is_table(self) -> bool:
        """Whether it is the embedding, whose rows are gathered and not multiplied by."""
        return self.parts[0].part == "embedding" and not self.is_tied

    def rows_of(self, name: str) -> slice:
        """Which outputs are those of the weight called ``name``."""
        start = 0
        for one in self.parts:
            if one.name == name:
                return slice(start, start + one.shape[0])
            start += one.shape[0]
        raise KeyError(name)


@dataclass(frozen=True)
class Quantization:
    """The format of every weight of a model.

    Attributes:
        formats: (selector, format) pairs. A selector is a part (``attention``, ``expert``, ``head``, ``embedding``, or
            ``hidden``: what an expert multiplies its hidden activations by), a modality (``audio``), both (``expert.audio``),
            or a layer (``layers.0``); of those that fit a weight the last counts. Format None: not quantised.
        scales: ``absmax`` takes each block's largest magnitude to the largest code, ``search`` tries several scales and keeps
            the one that loses least.
        signed: whether ``search`` may choose negative scales, which give positive weights the further end of an uneven range
            of codes (-8 to 7). onnxruntime takes them; TensorRT does not.
        packed: whether q, k and v of one route are one product: on a CPU a product has a cost of its own, and narrow ones are
            slow. TensorRT packs by itself.
        tied: whether the codes of the embedding are those of the head too, stored once.
        half_scales: whether scales are stored in float16 where the graph computes in float32. They are as wide as activations
            in memory, and take half of it in the file: in blocks of 32 half a bit of a weight.
        calibration: which sequences ``search`` weighed errors by: ``none``, those that the model ``sampled``, or a ``file``.
    """

    formats: tuple[tuple[str, WeightFormat | None], ...]
    scales: Scales = "search"
    signed: bool = False
    packed: bool = False
    tied: bool = False
    half_scales: bool = False
    calibration: Calibration = "none"

    def __post_init__(self) -> None:
        if self.scales not in SCALES:
            raise ConfigError(f"scales must be one of {', '.join(SCALES)} ({self.scales!r} came)")
        if self.calibration not in CALIBRATIONS:
            raise ConfigError(f"calibration must be one of {', '.join(CALIBRATIONS)} ({self.calibration!r} came)")

    @classmethod
    def usual(
        cls,
        stored: Stored,
        config: ModelConfig,
        block_size: int | None = None,
        symmetric: bool = True,
        table: Stored | None = None,
        overrides: Sequence[tuple[str, Stored | None, int | None]] = (),
        scales: Scales = "search",
        by_output: Sequence[Stored] = ("fp8",),
        signed: bool = False,
        packed: bool = False,
        careful: bool = False,
        half_scales: bool = False,
        calibration: Calibration = "none",
    ) -> "Quantization":
        """Every product's weight alike, but for what is said of parts.

        Args:
            stored: of attention, experts and heads.
            config: the model's.
            block_size: inputs that share a scale; None: ``usual_block_size``, or smaller ones where that is ``careful``.
            symmetric: whether zero is code 0.
            table: how the embedding is stored; None: in the graph's precision.
            overrides: (selector, type, block size) triples, the last that fits a weight counting; type None is the graph's
                precision, block size None the one above.
            scales: how they are chosen.
            by_output: types that have one scale per output where no block size is given.
            signed: whether scales may be negative.
            packed: whether q, k and v are one product.
            careful: whether a narrow model has smaller blocks, and in int4 8 bits at its ends, where nothing else is said.
            half_scales: whether scales are stored in float16.
            calibration: what errors are weighed by.

        Raises:
            ConfigError: for formats that do not exist, or that the model's widths do not fit.
        """
        careful = careful and stored in ("int4", "int8") and config.model_width < NARROW_WIDTH
        blocks = {kind: block_size or usual_block_size(config) for kind in CODE_RANGE}
        if careful and block_size is None and (fitting := blocks[stored]) is not None:
            blocks[stored] = min(fitting, NARROW_BLOCK_SIZE)

        def how(kind: Stored | None, size: int | None, is_table: bool) -> WeightFormat | None:
            if kind is None or kind == "fp16":
                return None if kind is None else WeightFormat(kind)
            usual = blocks[kind] if kind not in by_output else block_size if kind == stored else None
            return WeightFormat(kind, size or usual, symmetric or is_table or kind == "fp8")

        pairs = [(part, how(stored, None, False)) for part in QUANTIZED_PARTS if part != "embedding"]
        if careful and stored == "int4":
            pairs += [(part, how("int8", None, False)) for part in ("head", HIDDEN, *_edges(config))]
        pairs.append(("embedding", how(table, None, True)))
        pairs += [(selector, how(kind, size, selector.startswith("embedding"))) for selector, kind, size in overrides]
        tied = config.tied_embeddings and any(format is not None for selector, format in pairs if selector == "embedding")
        made = cls(tuple(pairs), scales, signed, packed, tied, half_scales, calibration)
        raise_all(ConfigError, "the model can not be quantised so:", made.problems(config))
        return made

    @property
    def name(self) -> str:
        """The type that is meant when nothing is said of parts."""
        return next((one.stored for _, one in self.formats if one is not None), "none")

    def format_of(self, parameter: Parameter) -> WeightFormat | None:
        """How ``parameter`` is stored; None: in the graph's own precision."""
        if len(parameter.shape) != 2 or parameter.part not in QUANTIZED_PARTS:
            return None
        mine = _selectors_of(parameter)
        return next((one for selector, one in reversed(self.formats) if selector in mine), None)

    def coded_weights(self, wanted: Sequence[Parameter]) -> tuple[CodedWeight, ...]:
        """The sets of codes and scales that hold those of ``wanted`` that are coded, in their order."""
        found: dict[str, CodedWeight] = {}
        for one in wanted:
            how = self.format_of(one)
            if how is None or not how.is_coded:
                continue
            name = together_name(one) if self.packed else one.name
            beside = found.get(name)  # of the same part and modality, so of the same format
            is_tied = self.tied and one.part == "embedding"
            found[name] = CodedWeight(name, (*(beside.parts if beside else ()), one), how, is_tied)
        return tuple(found.values())

    def weighs_errors_of(self, how: WeightFormat) -> bool:
        """Whether scales of this format were chosen by errors that count by their inputs: at 8 bits it would win nothing."""
        return self.calibration != "none" and self.scales == "search" and how.stored == "int4"

    def scale_bytes(self, itemsize: int) -> int:
        """Bytes of a stored scale, where activations take ``itemsize``."""
        return 2 if self.half_scales else itemsize

    def activation_block(self, config: ModelConfig) -> int | None:
        """Activations that share one 8-bit scale where onnxruntime multiplies codes on a CPU; None: it multiplies none.

        Its kernels round activations to 8 bits in the weights' own blocks (and take one scale per output as blocks of 32).
        """
        return max(self.activation_blocks(config).values(), default=None)

    def activation_blocks(self, config: ModelConfig) -> dict[str, int]:
        """The same by weight, for those that are multiplied so; a tied table under the name of the head that it is."""
        coded = [
            one for one in self.coded_weights(parameters(config)) if not one.is_table and one.how.stored in ("int8", "int4")
        ]
        return {
            SHARED_HEAD if one.is_tied else part.name: one.how.block_size or SMALLEST_FUSED_BLOCK
            for one in coded
            for part in one.parts
        }

    def multiplies(self, stored: Stored, config: ModelConfig) -> bool:
        """Whether any product is over codes of this type."""
        return any(how.stored == stored for how in self._multiplied(config))

    def _multiplied(self, config: ModelConfig) -> list[WeightFormat]:
        return [one.how for one in self.coded_weights(parameters(config)) if not one.is_table]

    def problems(self, config: ModelConfig) -> list[str]:
        """Why a model can not be stored so, as sentences; none where it can."""
        names = config.modality_names
        tables = [one for one in parameters(config) if len(one.shape) == 2]
        known = {*_SELECTED_PARTS, *names, *(f"{part}.{name}" for part in _SELECTED_PARTS for name in names)}
        known |= {layer_name(number) for number in range(config.num_layers)}
        problems = [
            f"nothing of this model is called {selector!r}: parts are {', '.join(_SELECTED_PARTS)}, "
            f"modalities {', '.join(names)}, layers {layer_name(0)} to {layer_name(config.num_layers - 1)}"
            for selector, _ in self.formats
            if selector not in known
        ]
        problems += [
            f"no weight of this model is {selector!r}: that part is the same for all modalities"
            for selector, _ in self.formats
            if "." in selector and selector in known and not any(selector in _selectors_of(one) for one in tables)
        ]
        coded = [(one, how) for one in parameters(config) if (how := self.format_of(one)) is not None]
        problems += sorted(
            {
                f"{one.part}: rows of {one.shape[1]} can not be cut into blocks of {how.block_size}; {_divisors(one.shape[1])}"
                for one, how in coded
                if how.block_size is not None and one.shape[1] % how.block_size
            }
        )
        if any(one.part != "embedding" and how.stored == "fp16" for one, how in coded):
            problems.append("fp16 is for the embedding alone: --precision says what everything else is computed in")
        if any(one.part == "embedding" and how.stored not in ("int8", "fp16") for one, how in coded):
            problems.append("the embedding is stored as int8 or fp16, or in the graph's own precision")
        if any(one.part == "embedding" and not how.symmetric for one, how in coded):
            problems.append("the embedding takes no zero points")
        is_coded = any(one.part == "embedding" and how.is_coded for one, how in coded)
        if config.tied_embeddings and any(one.part == "embedding" and not how.is_coded for one, how in coded):
            problems.append("a head that is tied to the embedding is stored as int8, or in the graph's own precision")
        if self.tied != (config.tied_embeddings and is_coded):
            problems.append(f"tied must be {str(not self.tied).lower()}: whether the embedding's codes are the head's too")
        return problems

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, for the manifest."""
        return {
            "scales": self.scales,
            "signed": self.signed,
            "packed": self.packed,
            "tied": self.tied,
            "half_scales": self.half_scales,
            "calibration": self.calibration,
            "formats": [
                {"of": selector, **({"stored": None} if one is None else _format_to_dict(one))}
                for selector, one in self.formats
            ],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Quantization":
        """What ``to_dict`` gave; KeyError, TypeError or ConfigError for anything else."""
        pairs = tuple((str(one["of"]), _format_from_dict(one)) for one in values["formats"])
        signed, packed, tied, half = (bool(values[name]) for name in ("signed", "packed", "tied", "half_scales"))
        return cls(pairs, values["scales"], signed, packed, tied, half, values["calibration"])


def parse_override(text: str) -> tuple[str, Stored | None, int | None]:
    """``head=int8``, ``expert.audio=int4:32`` or ``embedding=none`` (the graph's precision) as selector, type, block size.

    Raises:
        InputError: for anything else.
    """
    selector, _, kind = text.partition("=")
    stored, _, size = kind.partition(":")
    takes_block = stored in CODE_RANGE
    is_size = not size or (takes_block and size.isdecimal() and int(size) > 0)
    if selector and (stored == "none" or stored in STORED) and is_size and not kind.endswith(":"):
        return selector, None if stored == "none" else cast(Stored, stored), int(size) if size else None
    raise InputError(
        f"a part is PART=TYPE or PART=TYPE:BLOCK, as in head=int8 or expert.audio=int4:32, TYPE one of {', '.join(STORED)} or "
        f"none ({text!r} came)"
    )


def codes_of(weight: str) -> str:
    """The initializer that holds the codes of ``weight``: [in, out], or [rows, m] of the embedding table."""
    return f"{weight}.codes"


def scales_of(weight: str) -> str:
    """The initializer that holds its scales: [in / block, out], [out] without blocks, or [rows, m / block] of the table."""
    return f"{weight}.scales"


def zero_points_of(weight: str) -> str:
    """The initializer that holds its zero points, shaped as the scales; symmetric formats have none."""
    return f"{weight}.zero_points"


def stored_bytes_of(
    config: ModelConfig, quantization: Quantization | None, itemsize: int, wanted: Sequence[Parameter] | None = None
) -> int:
    """Bytes of a model's weights as they are stored, plain ones and scales taking ``itemsize`` each.

    Args:
        config: the model's.
        quantization: the format of every weight; None: all are plain.
        itemsize: bytes of a plain number.
        wanted: the weights that are counted; None: all.
    """
    formats = [
        (one, quantization.format_of(one) if quantization else None)
        for one in (parameters(config) if wanted is None else wanted)
    ]
    scale_bytes = itemsize if quantization is None else quantization.scale_bytes(itemsize)
    return sum(one.numel * itemsize if how is None else how.num_bytes(one, scale_bytes) for one, how in formats)


def usual_block_size(config: ModelConfig) -> int | None:
    """The largest block up to 128 that cuts every width of ``config`` evenly; None where not even the smallest does."""
    common = gcd(*(one.shape[1] for one in parameters(config) if len(one.shape) == 2))
    return max((size for size in BLOCK_SIZES if size <= USUAL_BLOCK_SIZE and common % size == 0), default=None)


def _edges(config: ModelConfig) -> list[str]:
    """The first and the last layer, by name; none of a model that has few."""
    is_deep = config.num_layers >= FEWEST_LAYERS_WITH_EDGES
    return [layer_name(number) for number in (0, config.num_layers - 1)] if is_deep else []


def _selectors_of(parameter: Parameter) -> tuple[str, ...]:
    """Everything that ``parameter`` is called by in ``formats``."""
    parts = [parameter.part, *([HIDDEN] if is_hidden_product(parameter) else [])]
    layer = [layer_name(number)] if (number := layer_of(parameter)) is not None else []
    return (*parts, str(parameter.modality), *(f"{part}.{parameter.modality}" for part in parts), *layer)


def layer_name(number: int) -> str:
    """What a layer is called in ``formats``."""
    return f"layers.{number}"


def _divisors(width: int) -> str:
    fitting = [str(size) for size in BLOCK_SIZES if width % size == 0]
    return f"blocks of {', '.join(fitting)} fit" if fitting else "no block size fits: keep that part in the graph's precision"


def _format_to_dict(one: WeightFormat) -> dict[str, Any]:
    return {"stored": one.stored, "block_size": one.block_size, "symmetric": one.symmetric}


def _format_from_dict(values: Mapping[str, Any]) -> WeightFormat | None:
    if values["stored"] is None:
        return None
    return WeightFormat(values["stored"], values["block_size"], values["symmetric"])
