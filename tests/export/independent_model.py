"""The model once more, in plain numpy and float64, from a training state's names: the oracle of decoder and graph.

Written from the model's description, position by position, without a cache and without any code of the package. Slow, and
meant to be read beside the description.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import erf, pi
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Scaling:
    """Llama 3.2's slowing of the long wavelengths."""

    factor: float
    low: float
    high: float
    original: int


@dataclass(frozen=True)
class IndependentModel:
    """A state and the numbers that it does not tell by itself.

    Attributes:
        state: the training state, float64.
        vocab_sizes: ids of each modality; they follow each other.
        num_heads: query heads.
        num_kv_heads: key/value heads.
        epsilon: of every RMSNorm.
        theta: of the rotation.
        halves: rotate (0, d/2), (1, d/2 + 1)... instead of (0, 1), (2, 3)...
        scaling: of the rotation's wavelengths.
    """

    state: Mapping[str, Array]
    vocab_sizes: tuple[int, ...]
    num_heads: int
    num_kv_heads: int
    epsilon: float
    theta: float
    halves: bool = False
    scaling: Scaling | None = None

    def logits(self, ids: Sequence[int], modality: Sequence[int], predicted: Sequence[int]) -> Array:
        """One whole sequence: [s] ids, the modality at and the modality predicted at each -> [s, v]."""
        stream = [self.state["tok_embeddings.weight"][one] for one in ids]
        layer = 0
        while f"layers.{layer}.attention_norm.weight" in self.state:
            stream = self._layer(f"layers.{layer}.", stream, modality)
            layer += 1
        final = [self._normalised(x, self.state["norm.weight"]) for x in stream]
        return np.stack([self._head(x, wanted) for x, wanted in zip(final, predicted, strict=True)])

    def _layer(self, prefix: str, stream: list[Array], modality: Sequence[int]) -> list[Array]:
        normed = [self._normalised(x, self.state[prefix + "attention_norm.weight"]) for x in stream]
        queries, keys, values = [], [], []
        for position, (x, m) in enumerate(zip(normed, modality, strict=True)):
            q = (self._projection(prefix, "wq", m) @ x).reshape(self.num_heads, -1)
            k = (self._projection(prefix, "wk", m) @ x).reshape(self.num_kv_heads, -1)
            queries.append([self._rotated(self._head_norm(prefix, "q", m, one), position) for one in q])
            keys.append([self._rotated(self._head_norm(prefix, "k", m, one), position) for one in k])
            values.append((self._projection(prefix, "wv", m) @ x).reshape(self.num_kv_heads, -1))
        result = []
        for position, (x, m) in enumerate(zip(stream, modality, strict=True)):
            mixed = []
            for head in range(self.num_heads):
                group = head // (self.num_heads // self.num_kv_heads)
                query = queries[position][head]
                scores = np.array([query @ keys[at][group] for at in range(position + 1)]) / np.sqrt(len(query))
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                mixed.append(sum(weight * values[at][group] for at, weight in enumerate(weights)))
            x = x + self._projection(prefix, "wo", m) @ np.concatenate(mixed)
            inner = self._normalised(x, self.state[prefix + "ffn_norm.weight"])
            result.append(x + self._expert(f"{prefix}feed_forward.local_experts.{m}.", inner))
        return result

    def _projection(self, prefix: str, name: str, modality: int) -> Array:
        routed = f"{prefix}attention.local_experts_{name}.{modality}.weight"
        return self.state[routed] if routed in self.state else self.state[f"{prefix}attention.{name}.weight"]

    def _head_norm(self, prefix: str, name: str, modality: int, x: Array) -> Array:
        key = f"{prefix}attention.local_experts_{name}_normalization.{modality}.weight"
        return self._normalised(x, self.state[key]) if key in self.state else x

    def _normalised(self, x: Array, weight: Array) -> Array:
        root: float = np.sqrt((x * x).mean() + self.epsilon)
        return x / root * weight

    def _rotated(self, x: Array, position: int) -> Array:
        """Each pair is a complex number, turned by its own angle."""
        size = len(x)
        pairs = [(i, i + size // 2) if self.halves else (2 * i, 2 * i + 1) for i in range(size // 2)]
        turned = np.empty_like(x)
        for number, (first, second) in enumerate(pairs):
            frequency = self._scaled(self.theta ** (-2.0 * number / size))
            value = complex(x[first], x[second]) * np.exp(1j * position * frequency)
            turned[first], turned[second] = value.real, value.imag
        return turned

    def _scaled(self, frequency: float) -> float:
        if self.scaling is None:
            return frequency
        wavelength = 2 * pi / frequency
        if wavelength < self.scaling.original / self.scaling.high:
            return frequency
        if wavelength > self.scaling.original / self.scaling.low:
            return frequency / self.scaling.factor
        smooth = (self.scaling.original / wavelength - self.scaling.low) / (self.scaling.high - self.scaling.low)
        return (1 - smooth) * frequency / self.scaling.factor + smooth * frequency

    def _expert(self, prefix: str, x: Array) -> Array:
        weights = {key.removeprefix(prefix): value for key, value in self.state.items() if key.startswith(prefix)}
        if "w1.weight" in weights:
            gate = weights["w1.weight"] @ x
            gated: Array = weights["w2.weight"] @ (gate / (1 + np.exp(-gate)) * (weights["w3.weight"] @ x))
            return gated
        hidden = weights["expert.fc1.weight"] @ (weights["down_proj.weight"] @ x) + weights.get("expert.fc1.bias", 0.0)
        active = np.array([0.5 * value * (1 + erf(value / 2**0.5)) for value in hidden])
        back = weights["expert.fc2.weight"] @ active + weights.get("expert.fc2.bias", 0.0)
        lifted: Array = weights["up_proj.weight"] @ back
        return lifted

    def _head(self, x: Array, predicted: int) -> Array:
        start = sum(self.vocab_sizes[:predicted])
        stop = start + self.vocab_sizes[predicted]
        logits = np.full(sum(self.vocab_sizes), -np.inf)
        if "output.weight" in self.state:
            logits[start:stop] = self.state["output.weight"][start:stop] @ x
        else:
            name = ("text_output.weight", "audio_output.weight")[predicted]
            logits[start:stop] = self.state[name] @ x
        return logits


def independent(state: Mapping[str, Any], config: Any) -> IndependentModel:
    """The oracle of a training state (tensors), its numbers taken from a configuration."""
    scaling = config.rope.scaling
    return IndependentModel(
        state={name: np.asarray(value.detach().numpy(), dtype=np.float64) for name, value in state.items()},
        vocab_sizes=tuple(one.vocab_size for one in config.modalities),
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        epsilon=config.norm_eps,
        theta=config.rope.theta,
        halves=config.rope.style == "half",
        scaling=None
        if scaling is None
        else Scaling(scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_seq_len),
    )
