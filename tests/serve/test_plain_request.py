"""What a plain request may say, and what the engine is then asked."""

from typing import Any

import pytest

from motrt.serve.plain_request import submit_options


@pytest.mark.parametrize(("asked", "most", "given"), [(100, 0, 0), (None, 0, 0), (-5, 0, -5), (None, -2, -2), (7, 10, 7)])
def test_nobody_has_a_higher_priority_than_is_allowed(asked: Any, most: int, given: int) -> None:
    assert submit_options({"prompt": [1], "priority": asked}, most)["priority"] == given


def test_what_is_no_priority_is_the_engines_to_refuse() -> None:
    assert submit_options({"prompt": [1], "priority": "high"}, 0)["priority"] == "high"
