"""Rows go to their own route and come back to their own place, whatever the mask and however it is arranged."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from motrt.model_def.routing import Gathered, OneRoute, Selected

masks = st.integers(2, 5).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(0, n - 1), max_size=40)))
ways = pytest.mark.parametrize("way", [Gathered, Selected])


@ways
@given(case=masks)
def test_combine_is_the_inverse_of_dispatch(way: type[Gathered | Selected], case: tuple[int, list[int]]) -> None:
    num_routes, values = case
    x = torch.arange(2.0 * len(values)).reshape(-1, 2)
    routing = way.by(torch.tensor(values, dtype=torch.int64), num_routes)
    assert torch.equal(routing.combine(routing.dispatch(x)), x)


@given(masks)
def test_each_route_gathers_its_own_rows_alone_and_in_order(case: tuple[int, list[int]]) -> None:
    num_routes, values = case
    x = torch.arange(float(len(values)))[:, None]
    parts = Gathered.by(torch.tensor(values, dtype=torch.int64), num_routes).dispatch(x)
    assert list(parts) == list(range(num_routes))
    for route, part in parts.items():
        assert part.flatten().tolist() == [float(at) for at, value in enumerate(values) if value == route]


@ways
@given(case=masks)
def test_what_a_route_does_reaches_its_own_positions_alone(way: type[Gathered | Selected], case: tuple[int, list[int]]) -> None:
    num_routes, values = case
    routing = way.by(torch.tensor(values, dtype=torch.int64), num_routes)
    parts = routing.dispatch(torch.zeros(len(values), 1))
    marked = routing.combine({route: part + route for route, part in parts.items()})
    assert marked.flatten().tolist() == [float(value) for value in values]


def test_what_is_not_selected_may_be_anything() -> None:
    routing = Selected.by(torch.tensor([0, 1, 0]), 2)
    own, other = torch.ones(3, 2), torch.full((3, 2), float("nan"))
    assert routing.combine({0: own, 1: other})[[0, 2]].tolist() == [[1, 1], [1, 1]]


@ways
def test_one_route_moves_nothing(way: type[Gathered | Selected]) -> None:
    x = torch.arange(6.0).reshape(3, 2)
    routing = way.by(torch.zeros(3, dtype=torch.int64), 1)
    assert routing == OneRoute()
    parts = routing.dispatch(x)
    assert parts == {0: x} and routing.combine(parts) is x


def test_a_known_route_is_the_only_one_asked() -> None:
    x = torch.arange(6.0).reshape(3, 2)
    assert list(OneRoute(2).dispatch(x)) == [2]
    assert OneRoute(2).combine({2: x}) is x
