"""The side-by-side runs from end to end on the tiny model, and times what it says that it times."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from motrt.benchmarks.contender import CASES, LONG_PROMPT, timed
from motrt.export.bundle_from_checkpoint import export_bundle
from motrt.model_def.config import ModelConfig

ROOT = Path(__file__).resolve().parent.parent


def test_contenders_take_turns_and_are_compared_with_ours(
    make_checkpoint: Callable[[ModelConfig], Path], tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(ModelConfig.tiny(max_seq_len=512))
    export_bundle(checkpoint, tmp_path / "int4", "int4", verify=False)
    command = [sys.executable, str(ROOT / "benchmarks" / "side_by_side.py"), "--int4", str(tmp_path / "int4")]
    command += ["--fp32", str(tmp_path / "int4"), "--rounds", "2"]  # the same again, in the second group
    command += ["--json", str(tmp_path / "found.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == json.loads((tmp_path / "found.json").read_text())
    assert set(found["contenders"]) == {"motrt int4", "motrt fp32"}
    for figures in found["contenders"].values():
        # A prompt of 1000 is more than this model holds.
        assert set(figures) == {case for case, (_, _, before) in CASES.items() if before != LONG_PROMPT}
        assert all(one["tokens_per_s"] > 0 for one in figures.values())
    ours = found["contenders"]["motrt int4"]["text decode"]["ours_is_faster_by"]
    assert ours == {"ratio": 1.0, "quartile_1": 1.0, "quartile_3": 1.0}


def test_a_case_is_timed_step_by_step(tmp_path: Path) -> None:
    """A contender that waits is measured waiting: nothing of the protocol is in its time."""

    class Counting:
        def __init__(self) -> None:
            self.asked: list[str] = []

        def has(self, modality: str, rows: int, length: int) -> bool:
            return modality == "text"

        def prefill(self, modality: str, rows: int, count: int) -> object:
            self.asked.append(f"prefill {count}")
            return self

        def step(self, modality: str, rows: int, state: object) -> None:
            assert state is self
            self.asked.append("step")

    counting, states = Counting(), dict[str, object]()
    first = timed(counting, states, "text decode", 3)
    again = timed(counting, states, "text decode", 2)
    assert [len(one["seconds"]) for one in (first, again)] == [3, 2]
    assert counting.asked == ["prefill 128", *["step"] * 4, *["step"] * 3]  # one more before each turn, not timed
    assert timed(counting, states, "text prefill of 128", 1)["tokens_per_step"] == 128
    assert timed(counting, states, "audio decode", 1) == {"missing": "it has no such thing"}
