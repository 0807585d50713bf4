"""Who masks with whom: everyone with everyone, or a random k-regular graph.

Bell et al., "Secure single-server aggregation with (poly)logarithmic overhead" (CCS 2020), section
3: nodes stand on a circle in random order, each is a neighbour of the k/2 before and after it.

>>> from dpfl_flower.rng import secure
>>> graph = neighbour_graph([3, 1, 2], None, secure())
>>> graph[1], graph[3]
((2, 3), (1, 2))
>>> {len(peers) for peers in neighbour_graph(list(range(50)), 6, secure()).values()}
{6}
"""

from collections.abc import Mapping, Sequence

from dpfl_flower.rng import RandomSource

__all__ = ["neighbour_graph"]


def neighbour_graph(
    nodes: Sequence[int], neighbours: int | None, rng: RandomSource
) -> Mapping[int, tuple[int, ...]]:
    """Return each node's neighbours, sorted.

    Parameters
    ----------
    nodes : sequence of int
        Each once.
    neighbours : int or None
        k, even; None or at least ``len(nodes) - 1``: everyone.
    rng : RandomSource
        Orders the circle.
    """
    size = len(nodes)
    if neighbours is None or neighbours >= size - 1:
        return {node: tuple(sorted(set(nodes) - {node})) for node in nodes}
    circle = rng.sample(nodes, size)
    half = neighbours // 2
    steps = [step for step in range(-half, half + 1) if step]
    return {
        node: tuple(sorted(circle[(place + step) % size] for step in steps))
        for place, node in enumerate(circle)
    }
