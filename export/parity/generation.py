"""P5: do both say the same, greedily, over many steps and change-overs? The first divergence decides.

A divergence where the reference itself hardly preferred its choice (a margin below the measured noise) is AMBIGUOUS:
rounding may fall either way there. Anything else is FAIL.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from motrt.errors import BackendError
from motrt.export.parity.findings import Finding, Outcome, json_number
from motrt.export.parity.row_noise import Key, RowLimits
from motrt.export.parity.scenarios import Scenario
from motrt.export.parity.tolerances import NEAR_TIE_DEVIATIONS
from motrt.model_def.config import ModelConfig
from motrt.runtime.schedule import Progress
from motrt.runtime.session import Logits, Session

RUNG = "P5"
NUM_TOKENS, RUN_LENGTH, PROMPT_LENGTH = 32, 8, 12


@dataclass(frozen=True)
class Greedy:
    """What a session said greedily.

    Attributes:
        tokens: unified ids.
        margins: by how much each led the runner-up of its range.
        rms: root mean square of each row of logits within its range.
    """

    tokens: list[int]
    margins: list[float]
    rms: list[float]


@dataclass(frozen=True)
class Plan:
    """A prompt, and the modality of each token after it."""

    name: str
    prompt: list[int]
    modalities: list[int]


def plans(config: ModelConfig, seed: int = 5) -> list[Plan]:
    """A prompt of each modality, then runs of all modalities in turn, beginning with another than the prompt's."""
    chance = np.random.default_rng(seed)
    length = min(PROMPT_LENGTH, max(1, config.max_seq_len // 4))
    count = min(NUM_TOKENS, config.max_seq_len - length)
    found: list[Plan] = []
    if count < 1:
        return found  # a prompt fills such a model
    for first, ids in enumerate(config.id_ranges):
        modalities = [(first + 1 + index // RUN_LENGTH) % len(config.modalities) for index in range(count)]
        prompt = chance.integers(ids.start, ids.stop, size=length).tolist()
        found.append(Plan(f"after a prompt of {config.modality_names[first]}", prompt, modalities))
    return found


def near_tie_margin(noise: float) -> float:
    """The largest margin that logits with errors of standard deviation ``noise`` may overturn."""
    return NEAR_TIE_DEVIATIONS * noise


def greedy(session: Session, prompt: Sequence[int], modalities: Sequence[int]) -> Greedy:
    """Decode one row greedily, token i of modality ``modalities[i]``, and keep the margins."""
    names = [session.config.modality_names[index] for index in modalities]
    said = Greedy([], [], [])
    logits, cache = session.prefill([prompt], names[0])
    for index, modality in enumerate(modalities):
        _say(said, logits, session.config.id_ranges[modality])
        if index + 1 < len(modalities):
            logits = session.decode_step(said.tokens[-1:], names[index + 1], cache)
    return said


def _say(said: Greedy, logits: Logits, ids: range) -> None:
    inside = logits[0, ids.start : ids.stop]
    best = int(np.argmax(inside))
    others = np.delete(inside, best)
    said.tokens.append(ids.start + best)
    said.margins.append(float(inside[best] - others.max()) if len(others) else float("inf"))
    said.rms.append(float(np.sqrt(np.mean(np.square(inside, dtype=np.float64)))))


@dataclass(frozen=True)
class Generated:
    """What a session generated where the reference said something.

    Attributes:
        plan: what was asked for.
        expected: what the reference said.
        came: the session's tokens.
        failure: why it ended early; empty where it did not.
    """

    plan: Plan
    expected: Greedy
    came: tuple[int, ...]
    failure: str = ""

    @property
    def matched(self) -> int:
        """Tokens until the first that differs."""
        pairs = enumerate(zip(self.expected.tokens, self.came, strict=False))
        return next((i for i, (a, b) in pairs if a != b), min(len(self.expected.tokens), len(self.came)))

    def to_dict(self, config: ModelConfig) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "plan": self.plan.name,
            "expected": list(self.expected.tokens),
            "came": list(self.came),
            "modalities": [config.modality_names[index] for index in self.plan.modalities],
            "margins": [json_number(one) for one in self.expected.margins],
            "matched": self.matched,
        }


def generation_findings(
    session: Session, references: Sequence[tuple[Plan, Greedy]], noise: float, limits: RowLimits | None = None
) -> list[Finding]:
    """Let ``session`` generate each plan, and compare; see ``generate_plans`` and ``judge_generated``."""
    return [judge_generated(one, noise, limits) for one in generate_plans(session, references)]


def as_scenario(plan: Plan, expected: Greedy) -> Scenario:
    """Return a plan's prompt and what the reference went on with as a known sequence."""
    return Scenario(plan.name, (np.array([*plan.prompt, *expected.tokens], np.int64),), (len(plan.prompt),))


def generate_plans(session: Session, references: Sequence[tuple[Plan, Greedy]]) -> list[Generated]:
    """Let ``session`` generate each plan through the product's own loop.

    Args:
        session: what is examined.
        references: each plan with what the reference said.
    """
    return [_generated(session, plan, expected) for plan, expected in references]


def _generated(session: Session, plan: Plan, expected: Greedy) -> Generated:
    names = session.config.modality_names

    def schedule(progress: Progress) -> str | None:
        done = len(progress.tokens)
        return names[plan.modalities[done]] if done < len(plan.modalities) else None

    came: list[int] = []
    try:
        came.extend(step.token_id for step in session.generate(plan.prompt, schedule=schedule))
    except BackendError as failure:  # logits that no id can be chosen from: a finding, not the end of the climb
        return Generated(plan, expected, tuple(came), str(failure))
    return Generated(plan, expected, tuple(came))


def judge_generated(generated: Generated, noise: float, limits: RowLimits | None = None) -> Finding:
    """PASS where every token agrees; else the first that differs decides.

    Args:
        generated: what came and what was expected.
        noise: the measured error of a logit, as a standard deviation.
        limits: what rounding alone does at each position; None: nobody measured it.
    """
    expected, came, matched = generated.expected, generated.came, generated.matched
    question = f"greedy tokens agree {generated.plan.name}"
    if generated.failure:
        return Finding(RUNG, question, Outcome.FAIL, generated.failure)
    figures = {"tokens": len(expected.tokens), "matched": matched, "noise": noise}
    if list(came) == expected.tokens:
        return Finding(RUNG, question, Outcome.PASS, "", figures)
    if matched in (len(came), len(expected.tokens)):
        detail = f"{len(came)} tokens came where {len(expected.tokens)} were asked for"
        return Finding(RUNG, question, Outcome.FAIL, detail, figures)
    margin = expected.margins[matched]
    if limits is not None:
        key = Key(
            as_scenario(generated.plan, expected).rows[0][: len(generated.plan.prompt) + matched].tobytes(),
            0,
            generated.plan.modalities[matched],
        )
        noise = max(noise, limits.noise_of(key) * expected.rms[matched])
    detail = f"differs from token {matched} on: {expected.tokens[matched]} expected with a margin of {margin:.3g}"
    outcome = Outcome.AMBIGUOUS if margin <= near_tie_margin(noise) else Outcome.FAIL
    return Finding(RUNG, question, outcome, detail, {**figures, "margin": margin})
