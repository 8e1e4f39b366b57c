"""Rows go to their own route and come back to their own place, whatever the mask."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from motrt.model_def.routing import Routing

masks = st.integers(2, 5).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(0, n - 1), max_size=40)))


@given(masks)
def test_combine_is_the_inverse_of_dispatch(case: tuple[int, list[int]]) -> None:
    num_routes, values = case
    x = torch.arange(2.0 * len(values)).reshape(-1, 2)
    routing = Routing.by(torch.tensor(values, dtype=torch.int64), num_routes)
    assert torch.equal(routing.combine(routing.dispatch(x)), x)


@given(masks)
def test_each_route_gets_its_own_rows_alone_and_in_order(case: tuple[int, list[int]]) -> None:
    num_routes, values = case
    x = torch.arange(float(len(values)))[:, None]
    parts = Routing.by(torch.tensor(values, dtype=torch.int64), num_routes).dispatch(x)
    assert len(parts) == num_routes
    for route, part in enumerate(parts):
        assert part.flatten().tolist() == [float(at) for at, value in enumerate(values) if value == route]


@given(masks)
def test_what_a_route_does_reaches_its_own_positions_alone(case: tuple[int, list[int]]) -> None:
    num_routes, values = case
    routing = Routing.by(torch.tensor(values, dtype=torch.int64), num_routes)
    parts = routing.dispatch(torch.zeros(len(values), 1))
    marked = routing.combine([part + route for route, part in enumerate(parts)])
    assert marked.flatten().tolist() == [float(value) for value in values]


def test_one_route_moves_nothing() -> None:
    x = torch.arange(6.0).reshape(3, 2)
    routing = Routing.by(torch.zeros(3, dtype=torch.int64), 1)
    assert routing.rows is None and routing.inverse is None
    (whole,) = routing.dispatch(x)
    assert whole is x and routing.combine([whole]) is x
