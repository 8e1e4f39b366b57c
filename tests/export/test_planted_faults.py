"""One fault of each kind, planted and caught: the whole table stands in docs/gate.md, with the command that makes it."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from motrt.benchmarks.doctored import Doctored
from motrt.benchmarks.examination import examine
from motrt.benchmarks.faults import BUILDS, FAULTS, KINDS, Fault
from motrt.export.parity import gate

FEW = (
    "one row is another's",
    "scales of two weights read crosswise",
    "one zero point off by one",
    "experts right, head routed by the token's modality",
    "the text filter too wide at its end",
    "the position bounded one before the buffer's end",
    "keys and values exchanged in one layer's cache",
    "the mask sees one position ahead",
    "GELU in the place of SiLU",
    "growing the cache loses a key",
    "one bit of the weights flipped",
)
BY_NAME = {one.name: one for one in FAULTS}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Each of ``BUILDS``, made when it is first wanted."""

    @cache
    def made(name: str) -> Path:
        return BUILDS[name].make(tmp_path_factory.mktemp("build"))

    return made


@pytest.fixture(scope="module", autouse=True)
def reference_once() -> Any:
    """What the reference says of a plain checkpoint, asked once for each: no fault changes it."""
    real, made = gate.reference, dict[Any, Any]()

    def remembered(config: Any, checkpoint: Any, *arguments: Any, **named: Any) -> Any:
        if named.get("weights") is not None or any(arguments):
            return real(config, checkpoint, *arguments, **named)
        key = (config.to_json(), checkpoint.path, named["graphs"])
        if key not in made:
            made[key] = real(config, checkpoint, **named)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate, "reference", remembered)
        yield


def test_the_table_has_faults_of_every_kind_and_no_two_of_one_name() -> None:
    assert len(FAULTS) >= 90
    assert {one.kind for one in FAULTS} == set(KINDS)
    assert len(BY_NAME) == len(FAULTS)
    assert {one.build for one in FAULTS} <= BUILDS.keys()


@pytest.mark.parametrize("name", FEW)
def test_it_is_caught_and_its_place_named(name: str, bundle: Callable[[str], Path], tmp_path: Path) -> None:
    fault = BY_NAME[name]
    said = examine(fault, {fault.build: bundle(fault.build)}, tmp_path / "planted")
    assert said.is_caught
    assert said.is_named_right, said.named


def test_where_nothing_is_planted_nothing_is_caught_and_no_place_named(bundle: Callable[[str], Path], tmp_path: Path) -> None:
    def nothing(untouched: Doctored) -> None: ...

    said = examine(Fault("nothing", "weights", "fp32", nothing), {"fp32": bundle("fp32")}, tmp_path / "untouched")
    assert (said.rungs, said.named, said.is_named_right) == ((), "", True)


def test_a_fault_that_is_named_elsewhere_is_not_named_right(bundle: Callable[[str], Path], tmp_path: Path) -> None:
    elsewhere = replace(BY_NAME["GELU in the place of SiLU"], place=(0, "experts"))
    said = examine(elsewhere, {"fp32": bundle("fp32")}, tmp_path / "planted")
    assert said.is_caught
    assert not said.is_named_right
