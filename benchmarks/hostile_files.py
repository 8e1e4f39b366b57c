"""Files that are damaged, lie, or are written by two runs at once: is each refused with a sentence, and nothing believed?

    .venv/bin/python benchmarks/hostile_files.py --json benchmarks/results/hostile_files.json

Five parts on the tiny model, each with its number of cases:

    bits         a bit of one of a bundle's files is flipped: `load(check="hash")` refuses it
    manifests    values of a manifest are changed, and its own hash with them: refused, or the bundle answers as before
    checkpoints  bytes and configurations of foreign checkpoints are changed: refused, or converted; how many became
                 another model is told, since these formats hash no bytes
    kills        a run that writes a checkpoint is killed: no folder is left, or a whole one, and the next run works
    races        three runs write one folder at once: one of them makes it, whole

Anything but a MotrtError or the right answer is a fault: its case is printed, and the exit code is 1.
"""

import copy
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import motrt
from motrt.benchmarks.document import leave, machine
from motrt.errors import MotrtError
from motrt.export.bundle_from_checkpoint import export_bundle
from motrt.model_def.checkpoint.assemble import Assembly, convert_llama, convert_mot
from motrt.model_def.checkpoint.native import open_checkpoint
from motrt.model_def.config import ModelConfig
from motrt.model_def.initialize import init_checkpoint, random_tensors
from motrt.tests.model_def import foreign

CONFIG = ModelConfig.tiny()
SELF_HASH = "manifest_sha256"
LONGEST_SECONDS = 20  # of a case; more is a hang

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 0.5, 10**30, 1e308, -1e308, float("nan"), "", "x", "../x", "/etc/passwd", "llama3"),
    *([], [1], [None], {}, {"a": 1}, {"rope_type": []}, [[[[]]]], "\x00", "model.onnx"),
)
ADDED = ("rope_scaling", "rope_parameters", "sliding_window", "auto_map", "layer_types", "rotary_dim", "unknown", "format")

Case = Callable[[random.Random, Path], str]
"""One case in an empty folder -> its outcome in a word or two."""


# What is changed.


def changed_json(values: Any, chance: random.Random) -> Any:
    """Return ``values`` with one or two of its parts replaced, removed or added."""
    values = copy.deepcopy(values)
    for _ in range(chance.randint(1, 2)):
        places = list(_places(values))
        if not places:
            break
        holder, key = chance.choice(places)
        what = chance.random()
        if what < 0.7:
            holder[key] = copy.deepcopy(chance.choice(ODD))
        elif what < 0.85:
            del holder[key]
        elif isinstance(holder, dict):
            holder[chance.choice(ADDED)] = copy.deepcopy(chance.choice(ODD))
    return values


def _places(values: Any) -> Iterator[tuple[Any, Any]]:
    keys = list(values) if isinstance(values, dict) else range(len(values)) if isinstance(values, list) else ()
    for key in keys:
        yield values, key
        yield from _places(values[key])


def changed_bytes(data: bytes, chance: random.Random) -> bytes:
    """Return ``data`` cut short, with bits flipped (most near its ends), or overwritten."""
    what, changed = chance.random(), bytearray(data)
    if what < 0.25:
        return data[: chance.randrange(len(data) + 1)]
    reach = len(data) if chance.random() < 0.5 else min(len(data), 3000)
    start = 0 if chance.random() < 0.7 else len(data) - reach
    if what < 0.8:
        for _ in range(chance.randint(1, 3)):
            changed[start + chance.randrange(reach)] ^= 1 << chance.randrange(8)
    else:
        at = start + chance.randrange(reach)
        changed[at : at + chance.randint(1, 8)] = chance.randbytes(chance.randint(0, 8))
    return bytes(changed)


# The parts.


def bits_case(bundle: Path) -> Case:
    names = sorted(json.loads((bundle / "manifest.json").read_text())["files"])

    def case(chance: random.Random, folder: Path) -> str:
        copied = shutil.copytree(bundle, folder / "bundle")
        file = copied / chance.choice(names)
        data = bytearray(file.read_bytes())
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        file.write_bytes(data)
        motrt.load(copied, check="hash").close()
        return f"FAULT: a flipped bit of {file.name} was not seen"

    return case


def manifests_case(bundle: Path) -> Case:
    expected = _answer(bundle)
    text = (bundle / "manifest.json").read_text()
    manifest = json.loads(text)
    assert sealed(manifest) == text, "a manifest is spelled otherwise now, and every case would be refused for that"

    def case(chance: random.Random, folder: Path) -> str:
        copied = shutil.copytree(bundle, folder / "bundle")
        (copied / "manifest.json").write_text(sealed(changed_json(manifest, chance)))
        return "answers as before" if np.array_equal(_answer(copied), expected) else "FAULT: other logits"

    return case


def sealed(values: dict[str, Any]) -> str:
    """A manifest's text with the right hash of itself, as somebody who means harm would write it."""
    body = {name: value for name, value in values.items() if name != SELF_HASH}
    plain = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return json.dumps({**body, SELF_HASH: hashlib.sha256(plain.encode()).hexdigest()}, indent=1, sort_keys=True) + "\n"


def _answer(bundle: Path) -> np.ndarray[Any, Any]:
    with motrt.load(bundle, num_threads=1) as session:
        return session.prefill([[1, 2, 100, 3]], next_modality=["text"])[0]


def checkpoints_case(sources: dict[str, Path], native: foreign.State) -> Case:
    def case(chance: random.Random, folder: Path) -> str:
        kind = chance.choice(sorted(sources))
        copied = shutil.copytree(sources[kind], folder / kind)
        file = chance.choice(sorted(one for one in copied.iterdir() if one.is_file()))
        if file.suffix == ".json" and chance.random() < 0.85:
            file.write_text(json.dumps(changed_json(json.loads(file.read_text()), chance)))
        else:
            file.write_bytes(changed_bytes(file.read_bytes(), chance))
        assembly = _converted(kind, copied)
        assembly.accounting.raise_unless_clean()
        values = dict(assembly.tensors())
        same = all(torch.equal(values[name], native[name]) for name in values if name in native)
        return "converted as before" if same else "converted, other weights (unhashed)"

    return case


def _converted(kind: str, folder: Path) -> Assembly:
    return convert_mot(folder / "state.pt", folder / "params.json") if kind == "mot" else convert_llama(folder)


def kills_case(chance: random.Random, folder: Path) -> str:
    out = folder / "model"
    run = multiprocessing.Process(target=_write_slowly, args=(out, 1))
    run.start()
    time.sleep(chance.random() * 0.12)
    os.kill(run.pid or 0, signal.SIGKILL)
    run.join()
    if out.exists():
        return "whole" if _seed_of(out) == 1 else "FAULT: half a model was left"
    init_checkpoint(out, CONFIG, "float32", 2, lambda _: None)
    is_alone = sorted(one.name for one in folder.iterdir()) == ["model"]
    return "nothing left, made again" if _seed_of(out) == 2 and is_alone else "FAULT: the next run did not clean up"


def races_case(chance: random.Random, folder: Path) -> str:
    out = folder / "model"
    runs = [multiprocessing.Process(target=_write_slowly, args=(out, seed)) for seed in range(3)]
    for run in runs:
        run.start()
    for run in runs:
        run.join(LONGEST_SECONDS)
    if any(run.exitcode not in (0, 1) for run in runs):
        return f"FAULT: exit codes {[run.exitcode for run in runs]}"
    winners = [seed for seed, run in enumerate(runs) if run.exitcode == 0]
    if not winners:
        return "FAULT: none made it" if out.exists() else "all refused"
    return "one made it" if len(winners) == 1 and _seed_of(out) == winners[0] else f"FAULT: {winners} made {_seed_of(out)}"


def _write_slowly(out: Path, seed: int) -> None:
    try:
        init_checkpoint(out, CONFIG, "float32", seed, lambda _: time.sleep(0.002))
    except MotrtError:
        os._exit(1)  # says so, and takes no part in the parent's clean-up
    os._exit(0)


def _seed_of(folder: Path) -> int | None:
    """The seed whose weights all of them are; None for a mixture."""
    checkpoint = open_checkpoint(folder)
    for seed in range(3):
        if all(torch.equal(checkpoint.read(name), value) for name, value in random_tensors(CONFIG, seed)):
            return seed
    return None


# Running them.


@contextmanager
def no_longer_than(seconds: int) -> Iterator[None]:
    def give_up(_: int, __: Any) -> None:
        raise TimeoutError(f"more than {seconds} s")

    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def outcome_of(case: Case, chance: random.Random, folder: Path) -> str:
    try:
        with no_longer_than(LONGEST_SECONDS):
            return case(chance, folder)
    except MotrtError:
        return "refused"
    except BaseException as failure:
        if isinstance(failure, KeyboardInterrupt):
            raise
        traceback.print_exc(limit=-4)
        return f"FAULT: {type(failure).__name__}"


def run_part(name: str, case: Case, count: int, seed: int, work: Path) -> Counter[str]:
    outcomes: Counter[str] = Counter()
    for number in range(count):
        folder = work / "case"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        outcome = outcome_of(case, random.Random(f"{seed} {name} {number}"), folder)
        if outcome.startswith("FAULT"):
            print(f"{name}, case {number}: {outcome}", file=sys.stderr)
        outcomes[outcome] += 1
    return outcomes


def make_sources(work: Path) -> tuple[Path, dict[str, Path], foreign.State]:
    """A bundle, foreign checkpoints by kind, and the weights of all of them."""
    init_checkpoint(work / "native", CONFIG, "float32", 0, lambda _: None)
    export_bundle(work / "native", work / "bundle", verify=False)
    native = dict(random_tensors(CONFIG, 0))
    (work / "mot").mkdir()
    foreign.write_mot(work / "mot", CONFIG, native)
    foreign.write_llama_meta(work / "meta", CONFIG, native)
    foreign.write_llama_hf(work / "hub", CONFIG, native)
    return work / "bundle", {kind: work / kind for kind in ("mot", "meta", "hub")}, native


@click.command(help=(__doc__ or "").splitlines()[0])
@click.option("--bits", default=600, show_default=True)
@click.option("--manifests", default=1000, show_default=True)
@click.option("--checkpoints", default=3000, show_default=True)
@click.option("--kills", default=200, show_default=True)
@click.option("--races", default=200, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the document here too.")
def main(seed: int, json_file: Path | None, **counts: int) -> None:
    torch.set_num_threads(1)  # children are forked
    multiprocessing.set_start_method("fork")
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as made:
        work = Path(made)
        bundle, sources, native = make_sources(work)
        cases = {
            "bits": bits_case(bundle),
            "manifests": manifests_case(bundle),
            "checkpoints": checkpoints_case(sources, native),
            "kills": kills_case,
            "races": races_case,
        }
        for name, case in cases.items():
            found[name] = dict(run_part(name, case, counts[name], seed, work))
    table = Table("part", "outcome", "cases")
    for name, outcomes in found.items():
        for outcome, count in outcomes.items():
            table.add_row(name, outcome, str(count))
    Console(stderr=True).print(table)
    leave({"machine": machine("torch", "onnxruntime"), "seed": seed, "outcomes": found}, json_file)
    sys.exit(int(any(outcome.startswith("FAULT") for outcomes in found.values() for outcome in outcomes)))


if __name__ == "__main__":
    main()
