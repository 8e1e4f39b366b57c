"""What a routed-expert decoder is made of: sizes, modalities, experts, heads. Standard library alone.

This file knows no framework and no file of weights: anything may import it. A configuration is checked when it is made
(all problems at once), frozen, and travels as JSON.

Shape letters, everywhere in this project: b batch, s new tokens, t cache capacity, n wanted logits, h query heads,
k key/value heads, d head size, m model width, v vocabulary (summed over the modalities).
"""

import dataclasses
import json
import math
import re
import sys
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin

from motrt.errors import ConfigError, raise_all

HeadKind = Literal["split", "shared"]
RopeStyle = Literal["interleaved", "half"]

# "shared" names projections that are not routed; the others would shadow methods of the module that holds the experts.
# fmt: off
RESERVED_MODALITY_NAMES = frozenset((
    "shared", "add_module", "apply", "bfloat16", "buffers", "call_super_init", "children", "clear", "compile", "copy", "cpu",
    "cuda", "double", "dump_patches", "eval", "extra_repr", "float", "forward", "get", "get_buffer", "get_extra_state",
    "get_parameter", "get_submodule", "half", "ipu", "items", "keys", "load_state_dict", "modules", "mtia", "named_buffers",
    "named_children", "named_modules", "named_parameters", "parameters", "pop", "register_backward_hook", "register_buffer",
    "register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook", "register_full_backward_pre_hook",
    "register_load_state_dict_post_hook", "register_load_state_dict_pre_hook", "register_module", "register_parameter",
    "register_state_dict_post_hook", "register_state_dict_pre_hook", "requires_grad_", "set_extra_state", "set_submodule",
    "setdefault", "share_memory", "state_dict", "to", "to_empty", "train", "training", "type", "update", "values", "xpu",
    "zero_grad",
))
# fmt: on

# Beyond these nothing could run, and counting or allocating it would hang: ONNX runtimes and TensorRT count elements of a
# dim in 32 bits, a row of 2^20 positions already takes tens of gigabytes of cache, no decoder has a tenth of these layers.
MAX_SIZE = 2**31 - 1
MAX_SEQ_LEN = 2**20
MAX_LAYERS = 4096

_WORD = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True)
class SwigluExpert:
    """``w2(silu(w1 x) * w3 x)``: the feed-forward of Llama.

    Attributes:
        hidden_size: width between the products.
        bias: whether w1, w2 and w3 carry biases (Llama's do not).
    """

    hidden_size: int
    bias: bool = False
    kind: Literal["swiglu"] = "swiglu"

    def problems(self) -> list[str]:
        return _mistyped(self) + _not_sizes(self, "hidden_size")


@dataclass(frozen=True)
class AdapterExpert:
    """``up_proj(fc2(gelu(fc1(down_proj x))))``: a narrower model's feed-forward between two projections.

    Attributes:
        width: the narrower model's own width.
        hidden_size: width between fc1 and fc2.
        bias: whether fc1 and fc2 carry biases; the projections never do. GELU is the exact (erf) one.
    """

    width: int
    hidden_size: int
    bias: bool = True
    kind: Literal["adapter"] = "adapter"

    def problems(self) -> list[str]:
        return _mistyped(self) + _not_sizes(self, "width", "hidden_size")


Expert = SwigluExpert | AdapterExpert


@dataclass(frozen=True)
class Modality:
    """One modality: its share of the unified vocabulary, and the expert its positions go through.

    Attributes:
        name: a lower-case word; it names weights, schedules and figures in reports.
        vocab_size: how many ids it owns. Ranges follow each other in the order of the modalities.
        expert: its feed-forward expert. Experts yield hidden states of the model's width, never tokens.
        codes_per_frame: ids that make one frame (EnCodec's four codebooks: 4); 1 where ids stand alone.
        frames_per_second: frames in a second of sound (EnCodec at 32 kHz: 50); None where time means nothing.
    """

    name: str
    vocab_size: int
    expert: Expert
    codes_per_frame: int = 1
    frames_per_second: float | None = None

    def problems(self) -> list[str]:
        found = _mistyped(self) + _not_sizes(self, "vocab_size", "codes_per_frame") + _not_positive(self, "frames_per_second")
        if isinstance(self.expert, Expert):
            found += self.expert.problems()
        if isinstance(self.name, str) and (not _WORD.fullmatch(self.name) or self.name in RESERVED_MODALITY_NAMES):
            found.append(f"name must be a lower-case word and not a reserved one ({self.name!r} came)")
        return [f"modality {self.name!r}: {problem}" for problem in found]


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's frequency scaling (Meta's llama-models, ``apply_scaling``), defaults as in Llama 3.2."""

    factor: float = 32.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192

    def problems(self) -> list[str]:
        sizes = ("factor", "low_freq_factor", "high_freq_factor", "original_max_seq_len")
        found = _mistyped(self) + _not_positive(self, *sizes)
        if not found and self.high_freq_factor <= self.low_freq_factor:
            found.append("high_freq_factor must be greater than low_freq_factor")
        return [f"rope.scaling: {problem}" for problem in found]


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding.

    Attributes:
        theta: base of the frequencies (Llama 3: 500000).
        style: ``interleaved`` rotates pairs (0, 1), (2, 3)... as Meta's checkpoints do; ``half`` rotates (0, d/2),
            (1, d/2 + 1)... as Hugging Face's do, whose wq and wk rows are permuted to match.
        scaling: Llama-3.2 frequency scaling, or None for checkpoints trained without it.
    """

    theta: float = 500000.0
    style: RopeStyle = "interleaved"
    scaling: RopeScaling | None = None

    def problems(self) -> list[str]:
        found = [f"rope.{problem}" for problem in _mistyped(self) + _not_positive(self, "theta")]
        return found + (self.scaling.problems() if isinstance(self.scaling, RopeScaling) else [])


@dataclass(frozen=True)
class ModelConfig:
    """A routed-expert decoder.

    Attributes:
        model_width: m, the width of the residual stream.
        num_layers: decoder layers.
        num_heads: h, query heads.
        num_kv_heads: k, key/value heads; divides num_heads.
        head_size: d, even (RoPE rotates pairs).
        modalities: in id order; at least one. One modality is a plain Llama.
        max_seq_len: most positions a row may hold, prompt and generated together.
        head: ``split`` (one output layer per modality) or ``shared`` (one over the summed vocabulary).
        routed_attention: whether wq, wk, wv, wo (and q/k norms) are kept per modality.
        qk_norm: whether queries and keys pass an RMSNorm per head before RoPE.
        tied_embeddings: whether the head is the embedding table itself; needs a shared head.
        norm_eps: epsilon of every RMSNorm.
        rope: rotary position embedding.

    Raises:
        ConfigError: naming every contradiction at once.
    """

    model_width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    modalities: tuple[Modality, ...]
    max_seq_len: int = 8192
    head: HeadKind = "split"
    routed_attention: bool = True
    qk_norm: bool = False
    tied_embeddings: bool = False
    norm_eps: float = 1e-5
    rope: RopeConfig = RopeConfig()

    def __post_init__(self) -> None:
        modalities: Any = self.modalities
        if isinstance(modalities, list):
            object.__setattr__(self, "modalities", tuple(modalities))
        raise_all(ConfigError, "impossible model configuration:", self.problems())

    def problems(self) -> list[str]:
        """Every contradiction in this configuration, as sentences; none in a configuration that exists."""
        mistyped = _mistyped(self)
        found = mistyped + _not_sizes(self, "model_width", "num_heads", "num_kv_heads", "head_size")
        found += _not_sizes(self, "num_layers", most=MAX_LAYERS) + _not_sizes(self, "max_seq_len", most=MAX_SEQ_LEN)
        found += _not_positive(self, "norm_eps")
        if isinstance(self.rope, RopeConfig):
            found += self.rope.problems()
        modalities = self.modalities if isinstance(self.modalities, tuple) else ()
        for modality in modalities:
            found += modality.problems() if isinstance(modality, Modality) else []
        return found if mistyped else found + self._contradictions()

    def _contradictions(self) -> list[str]:
        """What fields of the right types say against each other."""
        found = []
        if self.num_kv_heads > 0 and self.num_heads % self.num_kv_heads:
            found.append(f"num_kv_heads ({self.num_kv_heads}) must divide num_heads ({self.num_heads})")
        if self.head_size % 2:
            found.append(f"head_size must be even, RoPE rotates pairs ({self.head_size} came)")
        if not self.modalities:
            found.append("modalities must name at least one")
        sizes = [modality.vocab_size for modality in self.modalities]
        possible = [size for size in sizes if isinstance(size, int) and size <= MAX_SIZE]  # the others are named by themselves
        if sum(possible) > MAX_SIZE:
            found.append(f"vocab_size, summed over the modalities, must be at most {MAX_SIZE} ({sum(possible)} came)")
        names = [modality.name for modality in self.modalities if isinstance(modality.name, str)]
        if len(set(names)) < len(names):
            found.append(f"modalities must have different names ({', '.join(names)} came)")
        if self.tied_embeddings and self.head != "shared":
            found.append("tied_embeddings needs head 'shared': a split head has weights of its own")
        return found

    @property
    def vocab_size(self) -> int:
        """v: the vocabulary is *summed* over the modalities."""
        return sum(modality.vocab_size for modality in self.modalities)

    @property
    def modality_names(self) -> tuple[str, ...]:
        return tuple(modality.name for modality in self.modalities)

    @property
    def attention_routes(self) -> tuple[str, ...]:
        """The names under which attention weights are kept: one per modality, or ``shared``."""
        return self.modality_names if self.routed_attention else ("shared",)

    @property
    def id_ranges(self) -> tuple[range, ...]:
        """The ids that each modality owns, in the order of the modalities."""
        ranges, start = [], 0
        for modality in self.modalities:
            ranges.append(range(start, start + modality.vocab_size))
            start += modality.vocab_size
        return tuple(ranges)

    def modality_index(self, name: str) -> int:
        """The number of the modality called ``name``.

        Raises:
            ConfigError: when there is none of that name.
        """
        if name not in self.modality_names:
            raise ConfigError(f"no modality {name!r} in this model: it has {', '.join(self.modality_names)}")
        return self.modality_names.index(name)

    def modality_of(self, token_id: int) -> int:
        """The number of the modality that owns ``token_id``.

        Raises:
            ConfigError: when the id is outside the vocabulary.
        """
        for index, ids in enumerate(self.id_ranges):
            if token_id in ids:
                return index
        raise ConfigError(f"id {token_id} is outside the vocabulary 0..{self.vocab_size - 1}")

    def replace(self, **changes: Any) -> "ModelConfig":
        """A copy with ``changes``, checked anew."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; ``from_dict`` reads them back to an equal configuration."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return plain

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_dict(cls, values: Any) -> "ModelConfig":
        """The configuration that ``to_dict`` gave.

        Raises:
            ConfigError: for unknown, missing or misshapen fields, and for what ``problems`` finds.
        """
        fields = _fields(cls, values, "model configuration")
        if not isinstance(fields.get("modalities"), list | tuple):
            raise ConfigError("model configuration: modalities must be a list")
        fields["modalities"] = tuple(_modality_from_dict(item) for item in fields["modalities"])
        if "rope" in fields:
            rope = _fields(RopeConfig, fields["rope"], "rope")
            if rope.get("scaling") is not None:
                rope["scaling"] = RopeScaling(**_fields(RopeScaling, rope["scaling"], "rope.scaling"))
            fields["rope"] = RopeConfig(**rope)
        return cls(**fields)

    @classmethod
    def from_json(cls, text: str) -> "ModelConfig":
        """See ``from_dict``.

        Raises:
            ConfigError: also where ``text`` is not JSON.
        """
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"model configuration is not JSON: {error}") from None
        return cls.from_dict(values)

    @classmethod
    def preset(cls, name: str) -> "ModelConfig":
        """``tiny`` (tests), ``small`` (about 60M parameters), ``llama-3.2-1b``, ``llama-3.2-1b-text``.

        Raises:
            ConfigError: for any other name.
        """
        if name not in PRESETS:
            raise ConfigError(f"no preset {name!r}: choose one of {', '.join(PRESETS)}")
        return PRESETS[name]

    @classmethod
    def tiny(cls, **changes: Any) -> "ModelConfig":
        """The configuration that tests and examples share: every feature at the smallest size, 2 layers."""
        return cls.preset("tiny").replace(**changes)


def rope_frequencies(rope: RopeConfig, head_size: int) -> list[float]:
    """The angle by which each pair of a head turns from one position to the next: d/2 numbers.

    theta^(-2i/d) (Su et al. 2021, RoFormer); scaling follows Meta's llama-models: wavelengths longer than
    original/low_freq_factor are slowed by ``factor``, shorter than original/high_freq_factor are kept, and in between the two
    are blended.
    """
    frequencies = [rope.theta ** -(2 * i / head_size) for i in range(head_size // 2)]
    if rope.scaling is None:
        return frequencies
    scaling, scaled = rope.scaling, []
    for frequency in frequencies:
        turns = scaling.original_max_seq_len * frequency / (2 * math.pi)  # full turns over the original context
        blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        blend = min(max(blend, 0.0), 1.0)
        scaled.append(frequency * (blend + (1.0 - blend) / scaling.factor))
    return scaled


def _modality_from_dict(values: Any) -> Modality:
    fields = _fields(Modality, values, "modality")
    expert = fields.get("expert")
    kind = expert.get("kind") if isinstance(expert, dict) else None
    kinds: dict[str, type] = {"swiglu": SwigluExpert, "adapter": AdapterExpert}
    if not isinstance(kind, str) or kind not in kinds:
        raise ConfigError(f"modality {fields.get('name')!r}: expert.kind must be 'swiglu' or 'adapter' ({kind!r} came)")
    fields["expert"] = kinds[kind](**_fields(kinds[kind], expert, "expert"))
    return Modality(**fields)


def _fields(cls: Any, values: Any, where: str) -> dict[str, Any]:
    """``values`` as keyword arguments of ``cls``: none unknown, none missing. Types are the constructor's affair."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where} must be a JSON object ({type(values).__name__} came)")
    known = {field.name: field for field in dataclasses.fields(cls)}
    required = {name for name, field in known.items() if field.default is dataclasses.MISSING}
    problems = [f"unknown field {name!r}" for name in values if name not in known]
    problems += [f"missing field {name!r}" for name in sorted(required - set(values))]
    raise_all(ConfigError, f"{where}:", problems)
    return dict(values)


def _mistyped(holder: Any) -> list[str]:
    """The fields of a dataclass whose values are not of the types that it declares."""
    return [
        f"{field.name} must be {_type_words(field.type)} ({getattr(holder, field.name)!r} came)"
        for field in dataclasses.fields(holder)
        if not _is_of_type(getattr(holder, field.name), field.type)
    ]


def _is_of_type(value: Any, expected: Any) -> bool:
    if isinstance(expected, UnionType):
        return any(_is_of_type(value, one) for one in get_args(expected))
    if get_origin(expected) is Literal:
        return isinstance(value, str) and value in get_args(expected)
    if get_origin(expected) is tuple:
        return isinstance(value, tuple) and all(_is_of_type(item, get_args(expected)[0]) for item in value)
    # bool is an int to Python, and 'true' is no number to a reader of JSON; a whole number is a number.
    accepted = (int, float) if expected is float else expected
    return isinstance(value, accepted) and (expected is bool or not isinstance(value, bool))


def _type_words(expected: Any) -> str:
    if isinstance(expected, UnionType):
        return " or ".join(_type_words(one) for one in get_args(expected))
    if get_origin(expected) is Literal:
        return " or ".join(map(repr, get_args(expected)))
    if get_origin(expected) is tuple:
        return f"a list, each {_type_words(get_args(expected)[0])}"
    words = {int: "a whole number", bool: "true or false", str: "a string", float: "a number", NoneType: "null"}
    return words.get(expected, f"of type {expected.__name__}")


def _not_positive(holder: Any, *names: str) -> list[str]:
    """The numbers among these fields that are not above 0 and finite; what is no number, ``_mistyped`` names."""
    return [
        f"{name} must be positive ({getattr(holder, name)!r} came)"
        for name in names
        if _is_of_type(getattr(holder, name), float) and not 0 < getattr(holder, name) <= sys.float_info.max
    ]


def _not_sizes(holder: Any, *names: str, most: int = MAX_SIZE) -> list[str]:
    """The whole numbers among these fields that are not in 1..most; what is no whole number, ``_mistyped`` names."""
    values = {name: getattr(holder, name) for name in names if _is_of_type(getattr(holder, name), int)}
    too_small = [f"{name} must be positive ({value!r} came)" for name, value in values.items() if value < 1]
    return too_small + [f"{name} must be at most {most} ({value!r} came)" for name, value in values.items() if value > most]


# EnCodec at 32 kHz: 4 codebooks of 2048 codes at 50 frames a second; all four share the same 2048 ids.
ENCODEC_CODES, ENCODEC_CODEBOOKS, ENCODEC_FRAMES_PER_SECOND = 2048, 4, 50.0


def _audio(width: int, hidden_size: int) -> Modality:
    return Modality("audio", ENCODEC_CODES, AdapterExpert(width, hidden_size), ENCODEC_CODEBOOKS, ENCODEC_FRAMES_PER_SECOND)


_LLAMA_3_2_1B = ModelConfig(
    model_width=2048,
    num_layers=16,
    num_heads=32,
    num_kv_heads=8,
    head_size=64,
    modalities=(Modality("text", 128256, SwigluExpert(8192)), _audio(width=1024, hidden_size=4096)),
)

PRESETS: dict[str, ModelConfig] = {
    "tiny": ModelConfig(
        model_width=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_size=16,
        max_seq_len=128,
        modalities=(
            Modality("text", 96, SwigluExpert(128)),
            Modality("audio", 32, AdapterExpert(width=32, hidden_size=64), codes_per_frame=4, frames_per_second=50.0),
        ),
    ),
    # Heads as large as those of real models, four of which share keys: GPU kernels for smaller ones are others.
    "tiny64": ModelConfig(
        model_width=256,
        num_layers=2,
        num_heads=4,
        num_kv_heads=1,
        head_size=64,
        max_seq_len=256,
        modalities=(
            Modality("text", 96, SwigluExpert(512)),
            Modality("audio", 32, AdapterExpert(width=128, hidden_size=256), codes_per_frame=4, frames_per_second=50.0),
        ),
    ),
    "small": ModelConfig(
        model_width=512,
        num_layers=8,
        num_heads=8,
        num_kv_heads=4,
        head_size=64,
        max_seq_len=2048,
        modalities=(Modality("text", 16384, SwigluExpert(2048)), _audio(width=256, hidden_size=1024)),
    ),
    "llama-3.2-1b": _LLAMA_3_2_1B,
    "llama-3.2-1b-text": _LLAMA_3_2_1B.replace(modalities=_LLAMA_3_2_1B.modalities[:1], head="shared"),
}
