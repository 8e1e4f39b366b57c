"""Requests of every sort: each is answered, and the streams beside them do not notice."""

import json

import pytest

from motrt.benchmarks.fuzz import Answer, Sent, fuzz, problem_of, send
from motrt.tests.serve.served import Served


def test_every_request_is_answered_and_nobody_beside_it_notices(served: Served) -> None:
    """A hundred and some; ``benchmarks/fuzz.py`` makes ten thousand."""
    seen, beside = fuzz(served.port, served.engine.session.config, "tiny", 120, 0)
    assert seen["200"] > 15 and seen["400"] > 15
    assert beside.heard and not beside.problems
    assert served.get("/health/ready").status_code == 200


@pytest.mark.parametrize("manner", ["whole", "pieces", "slowly", "chunked"])
def test_a_request_in_order_is_answered_however_it_travels(manner: str, served: Served) -> None:
    body = json.dumps({"model": "tiny", "prompt": [1], "max_tokens": 2}).encode()
    answer = send(served.port, Sent(body, manner, 5))
    assert answer.status == 200 and len(json.loads(answer.body)["choices"][0]["token_ids"]) == 2
    assert problem_of(answer) is None


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (Answer(500, b'{"error": {"message": "a fault of its own"}}'), "status 500"),
        (Answer(503, b"{}"), "status 503"),
        (Answer(400, b'{"error": {"message": "no"}}'), "no sentence"),
        (Answer(200, b'data: {"choices": []}\n\n'), "ends with"),
        (Answer(200, b'data: {"error": {"message": "it broke"}}\n\ndata: [DONE]\n\n'), "ends with"),
    ],
)
def test_what_is_no_right_answer_is_seen(answer: Answer, problem: str) -> None:
    assert problem in str(problem_of(answer))
