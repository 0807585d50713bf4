"""A stack's products are the same to the last bit in every slot, and its graph the same numbers."""

import itertools

import pytest
import torch

from dpfl_flower.client.users import graph_passes, step_graph
from dpfl_flower.client.users.step_graph import StepGraph, aligned_empty
from tests.support.users import PER_RECORD, cnn, example_of, mlp, odd, records_of, words

SLOTS = 32
ROWS, INNER, COLUMNS = (1, 3, 7, 10, 16), (1, 10, 17, 130), (1, 2, 9, 16, 17, 33, 65, 170)


def stack_of(rows, columns, turned, generator):
    if turned:
        return torch.randn(SLOTS, columns, rows, generator=generator).transpose(1, 2)
    return torch.randn(SLOTS, rows, columns, generator=generator)


def shuffled(stack, turned, order):
    if turned:
        return stack.transpose(1, 2)[order].contiguous().transpose(1, 2)
    return stack[order].contiguous()


def moved(product):
    """How many of many shapes have a slot whose bits depend on its place."""
    generator = torch.Generator().manual_seed(0)
    found = 0
    shapes = itertools.product(ROWS, INNER, COLUMNS, (False, True), (False, True))
    for rows, inner, columns, left_turned, right_turned in shapes:
        left = stack_of(rows, inner, left_turned, generator)
        right = stack_of(inner, columns, right_turned, generator)
        order = torch.randperm(SLOTS, generator=generator)
        straight = product(left, right)
        turned = product(shuffled(left, left_turned, order), shuffled(right, right_turned, order))
        found += not torch.equal(straight[order], turned)
        torch.testing.assert_close(straight, torch.bmm(left, right), rtol=1e-4, atol=1e-4)
    return found


def test_a_slots_product_does_not_depend_on_its_place():
    def aligned(left, right):
        return step_graph._bmm(step_graph._aligned(left), step_graph._aligned(right))

    assert moved(aligned) == 0


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="a matter of MKL")
def test_without_alignment_it_would():
    assert moved(torch.bmm) > 0
    assert moved(lambda a, b: torch.bmm(step_graph._aligned(a), step_graph._aligned(b))) > 0
    assert moved(step_graph._bmm) > 0


@pytest.mark.parametrize("model_fn", [mlp, odd, words, cnn])
def test_what_is_left_out_of_a_graph_changes_no_bit(model_fn, monkeypatch):
    def gradients():
        torch.manual_seed(2)
        model = model_fn()
        graph = StepGraph(
            model,
            PER_RECORD,
            parameters=dict(model.named_parameters()),
            fixed={},
            example=example_of(model_fn),
            slots=SLOTS,
            batch_size=7,
            device=torch.device("cpu"),
        )
        stacks = [aligned_empty(SLOTS, p).copy_(p.detach()) for p in model.parameters()]
        users = [records_of(model_fn, 7, user) for user in range(SLOTS)]
        batch = [torch.stack(parts) for parts in zip(*users, strict=True)]
        weights = torch.full((SLOTS, 7), 1 / 7)
        return len(graph._graph.graph.nodes), graph.gradients(stacks, batch, weights)

    short, lean = gradients()
    for name in ("_skip_idle", "_skip_products_with_one", "_keep_scalars"):
        monkeypatch.setattr(graph_passes, name, lambda graph: None)
    long, full = gradients()
    assert short < 0.75 * long
    assert all(torch.equal(a, b) for a, b in zip(lean, full, strict=True))


def test_the_bytes_of_a_step_cover_what_it_holds():
    graphs = {}
    for slots in (32, 64):
        model = mlp()
        graphs[slots] = StepGraph(
            model,
            PER_RECORD,
            parameters=dict(model.named_parameters()),
            fixed={},
            example=example_of(mlp),
            slots=slots,
            batch_size=7,
            device=torch.device("cpu"),
        ).bytes
    assert graphs[64] == pytest.approx(2 * graphs[32], rel=0.01)
    assert graphs[32] > 32 * 2 * 4 * 4130  # parameters and gradients at the least


def test_every_product_of_a_graph_reads_aligned_operands():
    model = odd()
    graph = StepGraph(
        model,
        PER_RECORD,
        parameters=dict(model.named_parameters()),
        fixed={},
        example=example_of(odd),
        slots=SLOTS,
        batch_size=7,
        device=torch.device("cpu"),
    )
    nodes = graph._graph.graph.nodes
    assert not [node for node in nodes if node.target is torch.ops.aten.bmm.default]
    products = [node for node in nodes if node.target is step_graph._bmm]
    assert len(products) == 3 * 4 - 1  # forward, to weights and, but for the first, to inputs
    operands = [operand for node in products for operand in node.args]
    assert {operand.target for operand in operands} == {step_graph._aligned}
