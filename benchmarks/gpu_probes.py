"""What a GPU is asked beside right logits: memory errors, allocations beside a capture, device memory over many conversations.

    python benchmarks/gpu_probes.py --bundle bundle --json found.json
    compute-sanitizer --tool memcheck --error-exitcode 9 python benchmarks/gpu_probes.py --bundle bundle --only steps

Knows no torch: what runs under compute-sanitizer is onnxruntime and this package alone.
"""

import json
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np

from motrt.benchmarks.document import leave, machine
from motrt.errors import MotrtError
from motrt.runtime.backends import probe
from motrt.runtime.bundle import open_bundle
from motrt.runtime.cuda_device import CudaDevice
from motrt.runtime.load import cuda_session
from motrt.runtime.session import Session

NUM_CONVERSATIONS, NUM_AT_ONCE = 200, 4


def _prompt(session: Session, modality: int, count: int) -> list[int]:
    ids = session.config.id_ranges[modality]
    return [ids[(7 + 31 * place) % len(ids)] for place in range(count)]


def probe_steps(session: Any) -> dict[str, Any]:
    """A prefill and steps of each modality, of rows of several, and of rows that were joined: replayed, all of them."""
    config, caches = session.config, []
    for modality, name in enumerate(config.modality_names):
        _, cache = session.prefill([_prompt(session, modality, 20)], name)
        for token in _prompt(session, modality, 5):
            session.decode_step([token], name, cache)
        caches.append(cache)
    joined = session.join_rows([(cache, 0) for cache in caches])
    names = list(config.modality_names)
    for _ in range(5):
        session.decode_step([_prompt(session, modality, 1)[0] for modality in range(len(names))], names, joined)
    captured = sorted(graph.name for graph in session._recorded)
    return {"passes": session.passes, "captured": captured, "no_kernels": session.no_kernels}


@contextmanager
def allocating(device: CudaDevice) -> Iterator[list[int]]:
    """Another thread allocates and frees device memory as fast as it can; gives a list whose one number counts."""
    count, is_over, failures = [0], threading.Event(), list[str]()

    def work() -> None:
        try:
            while not is_over.is_set():
                device.allocate(1 << 20)
                count[0] += 1
        except Exception as failure:
            failures.append(str(failure))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield count
    finally:
        is_over.set()
        thread.join()
        if failures:
            print(f"the allocating thread ended: {failures[0]}", file=sys.stderr)


def probe_capture(session: Any) -> dict[str, Any]:
    """The first steps of each batch size, captured while another thread allocates: are they right, and are they captured?"""
    name, prompt, rows = session.config.modality_names[0], _prompt(session, 0, 20), (1, 2, 3, 4, 5, 6)
    token, held_caches = prompt[0], list[Any]()

    def said(count: int) -> list[Any]:
        _, cache = session.prefill([prompt] * count, name)
        held_caches.append(cache.buffers.held)
        return [session.decode_step([token] * count, name, cache) for _ in range(4)]

    with allocating(CudaDevice()) as allocations:
        beside = {count: said(count) for count in rows}
    alone = {count: said(count) for count in rows}
    ids = session.config.id_ranges[0]
    errors = [
        float(np.abs(one[:, ids.start : ids.stop] - other[:, ids.start : ids.stop]).max())
        for count in rows
        for one, other in zip(beside[count], alone[count], strict=True)
    ]
    can_still = sorted(graph.name for graph in session._recorded)
    return {
        "allocations": allocations[0],
        "largest_difference": max(errors),
        "no_kernels": session.no_kernels,
        "onnxruntime_still_captures": can_still,
        "steps": sorted({f"own kernels, {graph.name}" for held in held_caches for graph in held.kernels})
        + sorted({f"onnxruntime, {graph.name}" for held in held_caches for graph in held.steps}),
    }


def probe_conversations(session: Any) -> dict[str, Any]:
    """Device memory in use after a few conversations, and after many; one after the other, then several at once."""
    device, name = CudaDevice(), session.config.modality_names[0]

    def converse() -> Any:
        _, cache = session.prefill([_prompt(session, 0, 20)], name)
        for token in _prompt(session, 0, 3):
            session.decode_step([token], name, cache)
        return cache

    def used() -> int:
        free, total = device.memory()
        return total - free

    found = {"before": used()}
    for number in range(NUM_CONVERSATIONS):
        converse()
        if number == 9:
            found["after_10"] = used()
    found[f"after_{NUM_CONVERSATIONS}"] = used()
    for number in range(NUM_CONVERSATIONS // NUM_AT_ONCE):
        held = [converse() for _ in range(NUM_AT_ONCE)]
        del held
        if number == 4:
            found["at_once_after_5"] = used()
    found[f"at_once_after_{NUM_CONVERSATIONS // NUM_AT_ONCE}"] = used()
    return found


PROBES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "steps": probe_steps,
    "capture": probe_capture,
    "conversations": probe_conversations,
}


@click.command()
@click.option("--bundle", type=click.Path(path_type=Path), required=True)
@click.option("--only", type=click.Choice(list(PROBES)))
@click.option("--json", "json_file", type=click.Path(path_type=Path))
def main(bundle: Path, only: str | None, json_file: Path | None) -> None:
    """Every probe in a session of its own; one JSON document last. Exits with 1 where one failed."""
    if reason := probe("cuda").reason:
        raise click.ClickException(f"this asks a GPU, and onnxruntime cannot run on one here: {reason}")
    try:
        opened = open_bundle(bundle)
    except MotrtError as failure:
        raise click.ClickException(str(failure)) from None
    document: dict[str, Any] = {"machine": machine("motrt", "onnxruntime-gpu")}
    for name in (only,) if only else PROBES:
        try:
            for how, own in (("own kernels", True), ("onnxruntime's kernels", False)):
                with cuda_session(opened, step_kernels=own) as session:
                    document.setdefault(name, {})[how] = PROBES[name](session)
        except Exception:
            document[name] = {"failed": traceback.format_exc()[-4000:]}
        if json_file is not None:
            json_file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    leave(document, json_file)
    sys.exit(1 if any("failed" in found for found in document.values() if isinstance(found, dict)) else 0)


if __name__ == "__main__":
    main()
