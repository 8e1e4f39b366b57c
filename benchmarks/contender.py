"""One runtime in a process of its own, told on standard input what to do: lines of JSON in, lines of JSON out.

    python benchmarks/contender.py KIND PATH

Runtimes keep threads that spin for a while after each pass, so that two in one process slow each other down; and peers live in
environments of their own. So each has its process, and ``side_by_side.py`` lets them take turns. Nothing but the standard
library is imported before the kind is known.

In: ``{"case": "text decode", "steps": 4}``. Out: ``{"seconds": [...], "tokens_per_step": 1}``, or ``{"missing": "why"}``.
"""

import json
import sys
import time
from typing import Any, Protocol

PROMPT, LONG_PROMPT, ROWS = 128, 1000, 8
MOST_STEPS = 240  # of one case, all turns together

# case -> (modality, rows, ids before the steps); a prefill has no ids before.
CASES = {
    "text decode": ("text", 1, PROMPT),
    "audio decode": ("audio", 1, PROMPT),
    "audio decode, 8 rows": ("audio", ROWS, PROMPT),
    "text decode after 1000": ("text", 1, LONG_PROMPT),
    "audio decode after 1000": ("audio", 1, LONG_PROMPT),
    "text prefill of 128": ("text", 1, 0),
    "audio prefill of 128": ("audio", 1, 0),
}


class Contender(Protocol):
    """What each kind does."""

    def has(self, modality: str, rows: int, length: int) -> bool:
        """Whether it can do such a case, with so many ids before the last step."""

    def prefill(self, modality: str, rows: int, count: int) -> Any:
        """Read prompts; returns what ``step`` goes on with."""

    def step(self, modality: str, rows: int, state: Any) -> None:
        """One decode step of all rows."""


class Motrt:
    """A bundle through onnxruntime on the CPU, a checkpoint through PyTorch, or a graph that computes every expert."""

    def __init__(self, kind: str, path: str) -> None:
        import motrt

        if kind == "dense":
            from motrt.benchmarks.dense import dense_session

            self.session: Any = dense_session(path)
        else:
            self.session = motrt.load(path, {"motrt": "onnxruntime", "torch": "torch"}[kind])
        self.config = self.session.config

    def has(self, modality: str, rows: int, length: int) -> bool:
        return modality in self.config.modality_names and length <= self.config.max_seq_len

    def prefill(self, modality: str, rows: int, count: int) -> Any:
        ids = self.config.id_ranges[self.config.modality_index(modality)]
        _, cache = self.session.prefill([[ids[place % len(ids)] for place in range(count)]] * rows, modality)
        return cache

    def step(self, modality: str, rows: int, state: Any) -> None:
        ids = self.config.id_ranges[self.config.modality_index(modality)]
        self.session.decode_step([ids[5]] * rows, modality, state)


class LlamaCpp:
    """A GGUF file through llama.cpp; one conversation at a time, read anew where the case changes."""

    def __init__(self, path: str) -> None:
        import os

        from llama_cpp import Llama

        cores = os.cpu_count() or 1
        self.model = Llama(path, n_ctx=2048, n_threads=cores, n_threads_batch=cores, n_batch=512, verbose=False)
        self.current: object = None

    def has(self, modality: str, rows: int, length: int) -> bool:
        return modality == "text" and rows == 1

    def prefill(self, modality: str, rows: int, count: int) -> Any:
        self.model.reset()
        self.model.eval([(7 + 31 * place) % 128000 for place in range(count)])
        self.current = state = [count]
        return state

    def step(self, modality: str, rows: int, state: Any) -> None:
        if self.current is not state:  # another case was read over it
            self.model.reset()
            self.model.eval([(7 + 31 * place) % 128000 for place in range(state[0])])
            self.current = state
        self.model.eval([5])
        state[0] += 1


class Genai:
    """A model folder through onnxruntime-genai."""

    def __init__(self, path: str) -> None:
        import numpy as np
        import onnxruntime_genai as og

        self.og, self.np, self.model = og, np, og.Model(path)

    def has(self, modality: str, rows: int, length: int) -> bool:
        return modality == "text" and rows == 1

    def prefill(self, modality: str, rows: int, count: int) -> Any:
        settings = self.og.GeneratorParams(self.model)
        settings.set_search_options(max_length=count + MOST_STEPS, do_sample=False)
        generator = self.og.Generator(self.model, settings)
        generator.append_tokens(self.np.array([[(7 + 31 * place) % 128000 for place in range(count)]], self.np.int32))
        return generator

    def step(self, modality: str, rows: int, state: Any) -> None:
        state.generate_next_token()


def made(kind: str, path: str) -> Contender:
    if kind == "llama.cpp":
        return LlamaCpp(path)
    return Genai(path) if kind == "onnxruntime-genai" else Motrt(kind, path)


def timed(contender: Contender, states: dict[str, Any], case: str, steps: int) -> dict[str, Any]:
    """Some steps of one case, each timed; what comes before them is read when the case is first asked for."""
    modality, rows, before = CASES[case]
    if not contender.has(modality, rows, (before or PROMPT) + MOST_STEPS):
        return {"missing": "it has no such thing"}
    seconds = []
    if before and case not in states:
        states[case] = contender.prefill(modality, rows, before)
    if before:
        contender.step(modality, rows, states[case])  # the first after others had the machine is no one's measure
    for _ in range(steps):
        started = time.perf_counter()
        if before:
            contender.step(modality, rows, states[case])
        else:
            contender.prefill(modality, rows, PROMPT)
        seconds.append(time.perf_counter() - started)
    return {"seconds": seconds, "tokens_per_step": rows if before else rows * PROMPT}


def main() -> None:
    """Serve until standard input ends."""
    contender, states = made(sys.argv[1], sys.argv[2]), dict[str, Any]()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(timed(contender, states, asked["case"], asked["steps"])), flush=True)


if __name__ == "__main__":
    main()
