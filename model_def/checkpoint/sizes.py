"""The sizes that a source's configuration states, held against the shapes that its weights have. No framework.

Sizes that can be read off the weights (experts, biases, norms) are; sizes that can not (heads, RoPE, epsilon) come from the
configuration beside them; where both speak, they must agree.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from motrt.errors import ConfigError, raise_all
from motrt.model_def.checkpoint.name_table import LAYER_NUMBER
from motrt.model_def.checkpoint.rope import Rope
from motrt.model_def.config import AdapterExpert, Expert, Modality, ModelConfig, SwigluExpert
from motrt.model_def.parameters import EMBEDDING

Shapes = Mapping[str, tuple[int, ...]]
"""Native name -> dims, of what a source holds."""


@dataclass(frozen=True)
class Sizes:
    """What a source's configuration says.

    Attributes:
        file: where it was read.
        model_width: m.
        num_layers: decoder layers.
        num_heads: h.
        num_kv_heads: k.
        head_size: d.
        vocab_size: the *text* vocabulary; None where the file gives none.
        hidden_size: of the text feed-forward; None where the file gives none.
        norm_eps: of every RMSNorm.
        rope: base, style and scaling, with what was assumed.
        max_seq_len: None where the file gives none.
        is_tied: whether the embedding is the head too.
        qk_norm: whether queries and keys are normalised; None where the file does not say.
        ffn_bias: whether the text feed-forward has biases; None where the file does not say.
    """

    file: Path
    model_width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    vocab_size: int | None
    hidden_size: int | None
    norm_eps: float
    rope: Rope
    max_seq_len: int | None
    is_tied: bool = False
    qk_norm: bool | None = None
    ffn_bias: bool | None = None

    def config(self, modalities: tuple[Modality, ...], **choices: object) -> ModelConfig:
        """The configuration of these sizes with ``modalities``; ``choices`` are further fields of ``ModelConfig``.

        Raises:
            ConfigError: when the sizes are impossible together.
        """
        limit = {} if self.max_seq_len is None else {"max_seq_len": self.max_seq_len}
        try:
            return ModelConfig(
                model_width=self.model_width,
                num_layers=self.num_layers,
                num_heads=self.num_heads,
                num_kv_heads=self.num_kv_heads,
                head_size=self.head_size,
                modalities=modalities,
                norm_eps=self.norm_eps,
                rope=self.rope.config,
                **{**limit, **choices},  # type: ignore[arg-type]  # checked by ModelConfig itself
            )
        except ConfigError as failure:
            raise ConfigError(f"{self.file}: {failure}") from None

    def refuse_contradictions(self, shapes: Shapes, source: str) -> None:
        """Raise where the weights are not of these sizes.

        Raises:
            ConfigError: naming every contradiction.
        """
        raise_all(ConfigError, f"{self.file} contradicts the weights in {source}:", self._contradictions(shapes))

    def _contradictions(self, shapes: Shapes) -> list[str]:
        attention = "layers.0.attention.{}.text.weight"
        stated = [
            ("model width", self.model_width, _dim(shapes, EMBEDDING, 1)),
            ("layers", self.num_layers, num_layers(shapes)),
            ("heads x head size", self.num_heads * self.head_size, _dim(shapes, attention.format("wq"), 0)),
            ("key/value heads x head size", self.num_kv_heads * self.head_size, _dim(shapes, attention.format("wk"), 0)),
            ("text feed-forward width", self.hidden_size, _dim(shapes, "layers.0.feed_forward.text.w1.weight", 0)),
            ("norms of queries and keys", self.qk_norm, any(".q_norm." in name for name in shapes)),
            ("biases of the text feed-forward", self.ffn_bias, "layers.0.feed_forward.text.w1.bias" in shapes),
        ]
        return [
            f"{what}: the configuration says {said}, the weights have {have}"
            for what, said, have in stated
            if said is not None and have is not None and said != have
        ]


def num_layers(shapes: Shapes) -> int | None:
    """How many layers the names speak of; None where they speak of none."""
    numbers = [int(match[1]) for name in shapes if (match := re.match(rf"layers\.({LAYER_NUMBER})\.", name))]
    return max(numbers) + 1 if numbers else None


def expert_of(shapes: Shapes, modality: str) -> Expert | None:
    """The kind and sizes of one modality's expert, from the first layer that holds it; None where there is none.

    An adapter without projections (MusicGen alone) is as wide as its ``fc1``.
    """
    leaves: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        if match := re.fullmatch(rf"layers\.(?:{LAYER_NUMBER})\.feed_forward\.{modality}\.(.+)", name):
            leaves.setdefault(match[1], shape)
    if "w1.weight" in leaves:
        return SwigluExpert(_at(leaves["w1.weight"], 0), bias="w1.bias" in leaves)
    if "fc1.weight" in leaves:
        inner = leaves["fc1.weight"]
        width = _at(leaves["down_proj.weight"], 0) if "down_proj.weight" in leaves else _at(inner, 1)
        return AdapterExpert(width=width, hidden_size=_at(inner, 0), bias="fc1.bias" in leaves)
    return None


def _dim(shapes: Shapes, name: str, axis: int) -> int | None:
    return _at(shapes[name], axis) if name in shapes else None


def _at(shape: tuple[int, ...], axis: int) -> int:
    """One dim; 0, which no size equals, where the tensor has fewer dims."""
    return shape[axis] if axis < len(shape) else 0
