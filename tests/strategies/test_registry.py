import pytest
from flwr.clientapp import ClientApp

from dpfl_flower.simulation import InProcessGrid
from dpfl_strategies.registry import PopulationNotReached, Registry


class GrowingGrid:
    def __init__(self, *sizes):
        self.sizes = list(sizes)

    def get_node_ids(self):
        size = self.sizes.pop(0) if len(self.sizes) > 1 else self.sizes[0]
        return range(size, 0, -1)


def test_nobody_is_drawn_before_the_population_is_there():
    naps = []
    registry = Registry(5, sleep=naps.append)
    assert registry.node_ids(GrowingGrid(0, 2, 4, 5)) == (1, 2, 3, 4, 5)
    assert len(naps) == 3


def test_a_node_that_joins_later_is_not_part_of_the_population():
    registry = Registry(3, sleep=lambda _: None)
    grid = GrowingGrid(3, 9)
    assert registry.node_ids(grid) == registry.node_ids(grid) == (1, 2, 3)


def test_nobody_is_left_out_for_another():
    # Otherwise removing one node would bring in the next: the sum would move by two clip norms.
    assert Registry(3).node_ids(GrowingGrid(5)) == (1, 2, 3, 4, 5)


def test_waiting_ends_with_an_error_that_names_both_numbers():
    with pytest.raises(PopulationNotReached, match=r"2 nodes connected.*population=3"):
        Registry(3, wait_seconds=0).node_ids(GrowingGrid(2))


def test_nobody_is_waited_for_where_nobody_can_join():
    def never(seconds):
        raise AssertionError

    with InProcessGrid(ClientApp(), num_supernodes=2) as grid:
        assert len(Registry(2, sleep=never).node_ids(grid)) == 2
        with pytest.raises(PopulationNotReached, match=r"2 nodes.*population=3.*num_supernodes="):
            Registry(3, sleep=never).node_ids(grid)
