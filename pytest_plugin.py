"""For a user's own repository: gate a bundle in three lines of pytest. Found by pytest itself where motrt is installed.

    def test_the_bundle_is_still_the_model(motrt_verify):
        motrt_verify("path/to/bundle")

``pytest --motrt-report DIR`` writes ``DIR/<test>/report.html`` for each. Without what exports need the test is skipped.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from motrt.parity import ParityReport


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds ``--motrt-report``."""
    group = parser.getgroup("motrt")
    group.addoption("--motrt-report", metavar="DIR", help="write a parity report for each bundle that motrt_verify examines")


@pytest.fixture
def motrt_verify(request: pytest.FixtureRequest) -> "Callable[..., ParityReport]":
    """Climbs the parity ladder with a bundle, and fails the test with every finding that failed.

    Takes what ``motrt.parity.verify`` takes, and ``allow_ambiguous`` (True): whether near-ties that fell the other way pass.
    Returns the report.
    """
    try:
        from motrt import parity
    except ImportError as missing:
        pytest.skip(f"motrt_verify needs PyTorch and ONNX ({missing}): pip install 'motrt[export,cpu]'")

    def verify(bundle: str | Path, *, allow_ambiguous: bool = True, **options: Any) -> "ParityReport":
        folder = request.config.getoption("--motrt-report")
        if folder and "report" not in options:
            options["report"] = Path(folder) / re.sub(r"[^\w.-]+", "_", request.node.nodeid)
        report = parity.verify(bundle, **options)
        refused = [one for one in report.findings if one.outcome is parity.Outcome.FAIL]
        if not allow_ambiguous:
            refused += [one for one in report.findings if one.outcome is parity.Outcome.AMBIGUOUS]
        if refused:
            said = (
                "loses more than its budget of the model it was made of"
                if report.only_loses
                else "is not the model it was made of"
            )
            pytest.fail("\n  - ".join([f"{bundle} {said}:", *map(str, refused)]), pytrace=False)
        return report

    return verify
