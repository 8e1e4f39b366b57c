"""One fault of each kind, planted and caught: the whole table stands in docs/gate.md, with the command that makes it."""

from pathlib import Path

import pytest

from motrt.benchmarks.builds import traces_shared
from motrt.benchmarks.planted_faults import FAULTS, Bench

FEW = (
    "one element with the other sign",
    "mask shifted by one",
    "head shifted by one id",
    "values of one layer not written",
    "a token sees the next one",
    "approximate GELU",
    "one bit of the weights flipped",
    "growing the cache loses a key",
)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("planted"))


def test_the_table_has_at_least_forty_faults_of_every_kind() -> None:
    assert len(FAULTS) >= 40
    assert {one.kind for one in FAULTS} == {"weights", "routing", "cache", "numerics", "files", "session"}
    assert len({one.name for one in FAULTS}) == len(FAULTS)


@pytest.mark.parametrize("name", FEW)
def test_it_is_caught_and_placed(name: str, bench: Bench) -> None:
    fault = next(one for one in FAULTS if one.name.endswith(name))
    with traces_shared():
        told = bench.ask(fault)
    assert told.is_caught
    assert told.is_placed, told.said


def test_nothing_is_caught_where_nothing_is_planted(bench: Bench, tmp_path: Path) -> None:
    from dataclasses import replace

    fault = next(one for one in FAULTS if one.build == "fp32")
    with traces_shared():
        told = bench.ask(replace(fault, plant=lambda one: None))
    assert told.rungs == ()
    assert told.said.startswith("every part of the graph is within its budget")
