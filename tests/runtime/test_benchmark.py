"""The benchmark's figures are of what it says, and its sizes have bounds. No test asserts a duration."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import motrt
from motrt.cli import main
from motrt.errors import CapacityError, InputError
from motrt.model_def.config import ModelConfig
from motrt.model_def.parameters import parameters
from motrt.runtime import benchmark as measuring
from motrt.runtime.benchmark import benchmark, cache_bytes_per_step, num_parts, weight_bytes_per_step

TINY = ModelConfig.tiny()

PROMISED = {
    "text_decode_tokens_per_s",
    "audio_decode_tokens_per_s",
    "text_prefill_tokens_per_s",
    "audio_prefill_tokens_per_s",
    "mixed_decode_tokens_per_s",
    "memory_bandwidth_bytes_per_s",
    "text_share_of_limit",
    "audio_share_of_limit",
    "peak_rss_bytes",
}


@pytest.fixture(autouse=True)
def small_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "_ARRAY_BYTES", 1 << 16)


def test_the_figures_that_machines_read_are_all_there(tiny_bundle: Path) -> None:
    told: list[int] = []
    with motrt.load(tiny_bundle) as session:
        found = benchmark(session, None, 8, 5, 3, told.append)
        assert sum(told) == num_parts(session, 5)
    assert found.keys() >= PROMISED and all(found[name] > 0 for name in PROMISED)
    assert json.loads(json.dumps(found)) == found
    assert found["decode"]["mixed"]["rows"] == 3 and found["seconds_to_first_token"] > 0
    assert found["audio_seconds_per_s"] == pytest.approx(found["audio_decode_tokens_per_s"] / 200)


def test_every_case_takes_the_steps_that_were_asked_for(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[tuple[str, ...]] = []
    with motrt.load(tiny_bundle) as session:
        real = session.decode_step

        def counted(ids: object, names: list[str], cache: object) -> object:
            steps.append(tuple(names))
            return real(ids, names, cache)  # type: ignore[arg-type]

        monkeypatch.setattr(session, "decode_step", counted)
        benchmark(session, None, 4, 7, 1)
    for names in (("text",), ("audio",), ("text", "audio")):
        assert steps.count(names) == 7 + measuring.WARM_UP_STEPS


def test_bytes_are_counted_once_for_each_weight_that_is_read(tiny_bundle: Path) -> None:
    def by_hand(*modalities: str) -> int:
        read = [one for one in parameters(TINY) if one.part != "embedding" and one.modality in (None, *modalities)]
        return 4 * (sum(one.numel for one in read) + TINY.model_width)

    with motrt.load(tiny_bundle) as session:
        assert weight_bytes_per_step(session, None, {0}) == by_hand("text")
        both = by_hand("text", "audio") + 4 * TINY.model_width  # a row of the table for each modality
        assert weight_bytes_per_step(session, None, {0, 1}) == both
        # Keys and values: 2 layers, 2 heads of 16, float32.
        assert cache_bytes_per_step(session, np.array([3, 4])) == 7 * 2 * 2 * 2 * 16 * 4


@pytest.mark.parametrize("sizes", [(0, 4, 1), (4, 0, 1), (4, 4, 0), (4, 4, 10**9), (True, 4, 1)])
def test_sizes_out_of_range_are_refused(sizes: tuple[int, int, int], tiny_bundle: Path) -> None:
    with motrt.load(tiny_bundle) as session, pytest.raises(InputError, match="must be a whole number in"):
        benchmark(session, None, *sizes)


def test_more_positions_than_the_model_holds_are_refused_before_anything_runs(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with motrt.load(tiny_bundle) as session:
        monkeypatch.setattr(session, "execute", None)
        with pytest.raises(CapacityError, match="more than the 128 positions"):
            benchmark(session, None, 100, 40, 1)


def test_the_command_ends_with_one_line_of_json_behind_its_table(tiny_bundle: Path) -> None:
    said = CliRunner().invoke(main, ["bench", str(tiny_bundle), "--prompt", "8", "--tokens", "4"])
    assert said.exit_code == 0, said.output
    assert json.loads(said.stdout.splitlines()[-1]).keys() >= PROMISED
    assert "mixed decode, 2 rows" in said.stdout and "of memory's limit" in said.stdout
    plain = CliRunner().invoke(main, ["bench", str(tiny_bundle), "--prompt", "8", "--tokens", "4", "--json"])
    assert json.loads(plain.stdout).keys() >= PROMISED


def test_the_command_says_what_is_wrong(tiny_bundle: Path, tmp_path: Path) -> None:
    long = CliRunner().invoke(main, ["bench", str(tiny_bundle), "--prompt", "500"])
    assert long.exit_code == 2 and "more than the 128 positions" in long.stderr
    missing = CliRunner().invoke(main, ["bench", str(tmp_path / "nothing")])
    assert missing.exit_code == 1 and "does not exist" in missing.stderr
