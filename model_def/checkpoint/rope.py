"""RoPE as foreign configurations write it: every setting is used, known to be without effect, or refused by name.

Two kinds of file speak of it: Meta's ``params.json`` (``rope_theta``, ``use_scaled_rope``) and Hugging Face's ``config.json``
(``rope_theta``, ``rope_scaling``, and since transformers 5 ``rope_parameters``). What a file leaves out is its format's default
where the format has one, and otherwise the person who converts has to say it: a parity check cannot find a wrong base or
factor, because the reference model is built from the same configuration. Standard library alone.

Sources of the defaults: Meta's ``ModelArgs`` and published ``params.json`` files of Llama 1 to 3.3; ``LlamaConfig`` and
``modeling_rope_utils`` of transformers 5.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from motrt.errors import ConfigError, raise_all
from motrt.model_def.checkpoint.fields import field_problems, shown, value_or
from motrt.model_def.config import RopeConfig, RopeScaling

MetaCode = Literal["llama", "mot"]
"""Whose reading of params.json holds: Meta's Llama code, or the public Mixture-of-Transformers code."""

_MOT_THETA = 500000.0  # ModelArgs of the Mixture-of-Transformers code
_FIRST_THETA = 10000.0  # Llama 1 and 2, written before params.json had the field; LlamaConfig's default too
_LLAMA_3_VOCABULARY = 128000

# (dim, n_layers) of the published models whose params.json says use_scaled_rope and no factor.
_PUBLISHED_FACTORS: dict[tuple[int, int], tuple[str, float]] = {
    (2048, 16): ("Llama 3.2 1B", 32.0),
    (3072, 28): ("Llama 3.2 3B", 32.0),
    (4096, 32): ("Llama 3.1 8B", 8.0),
    (8192, 80): ("Llama 3.1 and 3.3 70B", 8.0),
    (16384, 126): ("Llama 3.1 405B", 8.0),
}


@dataclass(frozen=True)
class RopeChoices:
    """What the person who converts says of RoPE.

    Attributes:
        theta: base of the frequencies, for a file that does not give it.
        factor: frequency scaling's factor, for a file that does not give it.
        scaled: whether frequencies are scaled; None leaves it to the file.
    """

    theta: float | None = None
    factor: float | None = None
    scaled: bool | None = None

    def __post_init__(self) -> None:
        problems = [f"{name} must be positive (got {value:g})" for name, value in self._numbers() if not 0 < value < 1e30]
        if self.scaled is False and self.factor is not None:
            problems.append("a factor contradicts frequencies that are not scaled: give one of the two")
        raise_all(ConfigError, "RoPE:", problems)

    def _numbers(self) -> list[tuple[str, float]]:
        return [(name, value) for name, value in (("theta", self.theta), ("factor", self.factor)) if value is not None]


@dataclass(frozen=True)
class Rope:
    """RoPE as it was read.

    Attributes:
        config: what the model gets.
        notes: what was assumed or overruled, a sentence each.
    """

    config: RopeConfig
    notes: tuple[str, ...] = ()

    def described(self) -> tuple[str, ...]:
        """Return the lines for the report: what RoPE is, then the notes."""
        scaling = f"scaled by {self.config.scaling.factor:g}" if self.config.scaling else "not scaled"
        return (f"RoPE: {self.config.style}, theta {self.config.theta:g}, {scaling}", *self.notes)


def meta_rope(file: Path, values: Mapping[str, Any], choices: RopeChoices, code: MetaCode) -> Rope:
    """Read RoPE from the fields of a ``params.json``.

    Args:
        file: where they stand, for errors.
        values: the fields, of the right types.
        choices: what the person who converts says.
        code: whose reading of the file holds.

    Raises:
        ConfigError: when ``choices`` contradict the file, or neither says what is needed.
    """
    theta, theta_notes = _meta_theta(file, values, choices, code)
    scaling, scaling_notes = _meta_scaling(file, values, choices, code)
    return Rope(RopeConfig(theta, "interleaved", scaling), (*theta_notes, *scaling_notes))


def hf_rope(file: Path, values: Mapping[str, Any], head_size: int, choices: RopeChoices) -> Rope:
    """Read RoPE from the fields of a Hugging Face ``config.json``.

    Args:
        file: where they stand, for errors.
        values: the fields.
        head_size: d, all of which must be rotated.
        choices: what the person who converts says.

    Raises:
        ConfigError: naming every setting that is contradictory, incomplete, or of another kind of RoPE.
    """
    named = {name: values.get(name) for name in ("rope_parameters", "rope_scaling")}
    places: dict[str, Any] = {name: one for name, one in named.items() if one is not None and one != {}}
    wrong = [
        f"{name} must be a JSON object or null (got {shown(one)})" for name, one in places.items() if not isinstance(one, dict)
    ]
    raise_all(ConfigError, f"{file}:", wrong)
    problems = [problem for name, one in places.items() for problem in _place_problems(name, one)]
    problems += _rotated_part_problems(values, places, head_size)
    raise_all(ConfigError, f"{file}:", problems or _disagreements(values, places))
    theta = _said(file, "rope_theta", next(iter(_thetas(values, places).values()), None), "--rope-theta", choices.theta)
    scaling = next((_llama3_scaling(one) for one in places.values()), None)
    scaling, notes = _hf_scaling(file, scaling, choices)
    return Rope(RopeConfig(float(_FIRST_THETA if theta is None else theta), "half", scaling), notes)


# params.json.


def _meta_theta(file: Path, values: Mapping[str, Any], choices: RopeChoices, code: MetaCode) -> tuple[float, tuple[str, ...]]:
    said = _said(file, "rope_theta", values.get("rope_theta"), "--rope-theta", choices.theta)
    if said is not None:
        return float(said), ()
    if code == "mot":
        default = f"{_MOT_THETA:g} is assumed, the default of the Mixture-of-Transformers code"
        return _MOT_THETA, (f"RoPE: {file.name} gives no rope_theta: {default} (--rope-theta says another)",)
    if value_or(values, "use_scaled_rope", False) or value_or(values, "vocab_size", 0) >= _LLAMA_3_VOCABULARY:
        raise ConfigError(
            f"{file}: rope_theta is missing, and other fields are of Llama 3, all of whose files give it: "
            "say it with --rope-theta (published Llama 3 models have 500000)"
        )
    default = f"{_FIRST_THETA:g} is assumed, as Llama 1 and 2 have it, whose files do not name it"
    return _FIRST_THETA, (f"RoPE: {file.name} gives no rope_theta: {default} (--rope-theta says another)",)


def _meta_scaling(
    file: Path, values: Mapping[str, Any], choices: RopeChoices, code: MetaCode
) -> tuple[RopeScaling | None, tuple[str, ...]]:
    is_stated = bool(value_or(values, "use_scaled_rope", False))
    is_asked = choices.scaled or (choices.factor is not None and (code == "mot" or is_stated))
    if choices.factor is not None and not is_asked:
        raise ConfigError(f"{file}: use_scaled_rope is not set, so --rope-factor has nothing to scale: add --rope-scaling")
    if is_asked or (is_stated and code == "llama" and choices.scaled is None):
        factor, notes = _meta_factor(file, values, choices)
        high = float(value_or(values, "rope_high_freq_factor", RopeScaling().high_freq_factor))
        return RopeScaling(factor=factor, high_freq_factor=high), notes
    if is_stated and code == "mot":
        return None, (
            f"RoPE is not scaled: {file.name} says use_scaled_rope, which the public Mixture-of-Transformers code accepts and "
            "ignores, in training and in inference; if the code that trained this state heeds it, convert with --rope-scaling",
        )
    return None, (f"RoPE is not scaled, as was asked: {file.name} says use_scaled_rope",) if is_stated else ()


def _meta_factor(file: Path, values: Mapping[str, Any], choices: RopeChoices) -> tuple[float, tuple[str, ...]]:
    said = _said(file, "rope_scaling_factor", values.get("rope_scaling_factor"), "--rope-factor", choices.factor)
    if said is not None:
        return float(said), ()
    published = _PUBLISHED_FACTORS.get((values["dim"], values["n_layers"]))
    if published is None:
        raise ConfigError(
            f"{file}: RoPE is scaled and no rope_scaling_factor is given, and the sizes are of no published Llama: "
            "say it with --rope-factor (Llama 3.1 and 3.3 have 8, Llama 3.2 1B and 3B have 32)"
        )
    name, factor = published
    return factor, (f"RoPE: {file.name} gives no factor: {factor:g} is assumed, as {name} has it, whose sizes these are",)


# config.json.

_DEFAULT_FIELDS = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
_LLAMA3_NUMBERS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def _place_problems(place: str, one: Mapping[str, Any]) -> list[str]:
    """What is wrong with one of the two objects, taken alone."""
    kind, other = one.get("rope_type"), one.get("type")
    if kind is not None and other is not None and kind != other:
        return [f"{place}: rope_type says {shown(kind)}, type says {shown(other)}"]
    kind = _kind(one)
    if kind not in ("default", "llama3"):
        return [f"{place}: RoPE must be of type 'default' or 'llama3' (got {shown(kind)}): this decoder has no other"]
    required = _LLAMA3_NUMBERS if kind == "llama3" else ()
    problems = field_problems(one, required, ("rope_theta",))
    known = (*_DEFAULT_FIELDS, *required)
    problems += [
        f"{name} ({shown(one[name])}) has no meaning for type {kind!r}"
        for name in one
        if one[name] is not None and name not in known
    ]
    return [f"{place}: {problem}" for problem in problems]


def _rotated_part_problems(values: Mapping[str, Any], places: Mapping[str, Mapping[str, Any]], head_size: int) -> list[str]:
    """Settings by which only a part of each head is rotated."""
    whole = {"": values, **{f"{name}.": one for name, one in places.items()}}
    found = [
        (f"{place}{name}", one[name], full)
        for place, one in whole.items()
        for name, full in (("partial_rotary_factor", 1.0), ("rotary_dim", head_size))
        if one.get(name) is not None
    ]
    return [
        f"{name} must be {full} (got {shown(value)}): all of each head is rotated here"
        for name, value, full in found
        if value != full
    ]


def _disagreements(values: Mapping[str, Any], places: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Where two settings say different things: transformers' order of preference has changed, so none is chosen."""
    thetas = _thetas(values, places)
    if len(places) > 1:  # each is a whole: one that gives no base means the default, not the other's
        default = value_or(values, "rope_theta", _FIRST_THETA)
        thetas |= {f"{name}.rope_theta": value_or(one, "rope_theta", default) for name, one in places.items()}
    problems = []
    if len(set(thetas.values())) > 1:
        problems.append("rope_theta differs: " + ", ".join(f"{name} is {value:g}" for name, value in thetas.items()))
    if len({_llama3_scaling(one) for one in places.values()}) > 1:
        problems.append("rope_parameters and rope_scaling differ: remove the one that is not meant")
    outside = values.get("original_max_position_embeddings")
    inside = [scaling.original_max_seq_len for one in places.values() if (scaling := _llama3_scaling(one))]
    if outside is not None and inside and outside != inside[0]:
        problems.append(f"original_max_position_embeddings differs: {outside!r} outside, {inside[0]} in the RoPE settings")
    return problems


def _thetas(values: Mapping[str, Any], places: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Every base that is given, by where it stands."""
    found = {
        "rope_theta": values.get("rope_theta"),
        **{f"{name}.rope_theta": one.get("rope_theta") for name, one in places.items()},
    }
    return {name: value for name, value in found.items() if value is not None}


def _kind(one: Mapping[str, Any]) -> Any:
    return next((one[name] for name in ("rope_type", "type") if one.get(name) is not None), "default")


def _llama3_scaling(one: Mapping[str, Any]) -> RopeScaling | None:
    if _kind(one) != "llama3":
        return None
    factor, low, high, original = (one[name] for name in _LLAMA3_NUMBERS)
    return RopeScaling(float(factor), float(low), float(high), original)


def _hf_scaling(file: Path, stated: RopeScaling | None, choices: RopeChoices) -> tuple[RopeScaling | None, tuple[str, ...]]:
    if choices.scaled is False:
        return None, (f"RoPE is not scaled, as was asked: {file.name} says it is",) if stated else ()
    factor = _said(file, "factor", stated.factor if stated else None, "--rope-factor", choices.factor)
    if stated is not None:
        return stated, ()
    if factor is None and choices.scaled is None:
        return None, ()
    if factor is None or not choices.scaled:
        raise ConfigError(f"{file}: RoPE is not scaled there: --rope-scaling and --rope-factor scale it only together")
    return replace(RopeScaling(), factor=float(factor)), (f"RoPE is scaled, as was asked: {file.name} does not say so",)


def _said(file: Path, name: str, stated: float | None, option: str, chosen: float | None) -> float | None:
    """The value that the file or the option gives; None where neither does."""
    if stated is not None and chosen is not None and stated != chosen:
        raise ConfigError(f"{file}: {name} is {stated:g}, and {option} says {chosen:g}: leave the option out, or mend the file")
    return chosen if stated is None else stated
