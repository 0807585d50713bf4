"""What adds up clipped gradients multiplies in float32, whatever torch may round products to."""

import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import TensorDataset

from dpfl_flower.client import DPSGDConfig, NodeLedger, StackedDPSGD
from dpfl_flower.client.per_example import per_example_clipper
from dpfl_flower.client.per_sample.contributions import Ghost, Held, Outer
from dpfl_flower.client.per_sample.full_precision import full_precision
from dpfl_flower.client.per_sample.outers import Outers

CROSS_ENTROPY = nn.CrossEntropyLoss(reduction="none")
CPU, CUDA = SimpleNamespace(is_cuda=False), SimpleNamespace(is_cuda=True)
BACKENDS = torch.backends
OPERATIONS = {
    "cuda": (BACKENDS.cuda.matmul, BACKENDS.cudnn.conv, BACKENDS.cudnn.rnn),
    "mkldnn": (BACKENDS.mkldnn.matmul, BACKENDS.mkldnn.conv, BACKENDS.mkldnn.rnn),
}


def older_names():
    """What torch's older names say, or that they raise: of state that only newer ones can set."""
    found = []
    for ask in (
        torch.get_float32_matmul_precision,
        torch._C._get_cublas_allow_tf32,
        torch._C._get_cudnn_allow_tf32,
    ):
        try:
            found.append(ask())
        except RuntimeError:
            found.append("raises")
    return found


def state():
    newer = [of.fp32_precision for operations in OPERATIONS.values() for of in operations]
    return [BACKENDS.fp32_precision, BACKENDS.cudnn.fp32_precision, *newer, *older_names()]


@pytest.fixture(autouse=True)
def _as_torch_begins():
    untouched()  # a test elsewhere, of this process, may have set torch's older names
    yield
    untouched()


def untouched():
    torch.set_float32_matmul_precision("highest")
    BACKENDS.fp32_precision = "none"
    BACKENDS.cudnn.fp32_precision = "none"
    for operations in OPERATIONS.values():
        for operation in operations:
            operation.fp32_precision = "none"
    BACKENDS.cudnn.allow_tf32 = True


def set_newer(of, precision):
    of.fp32_precision = precision


SETTINGS = {
    "default": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allow-tf32": lambda: setattr(BACKENDS.cuda.matmul, "allow_tf32", True),
    "no-tf32-in-cudnn": lambda: setattr(BACKENDS.cudnn, "allow_tf32", False),
    "all-tf32": lambda: set_newer(BACKENDS, "tf32"),
    "all-bf16": lambda: set_newer(BACKENDS, "bf16"),
    "cuda-tf32": lambda: set_newer(BACKENDS.cudnn, "tf32"),
    "products-tf32": lambda: set_newer(BACKENDS.cuda.matmul, "tf32"),
    "products-bf16": lambda: set_newer(BACKENDS.mkldnn.matmul, "bf16"),
    "convolutions-tf32": lambda: set_newer(BACKENDS.cudnn.conv, "tf32"),
    "mixed-names": lambda: [
        torch.set_float32_matmul_precision("high"),
        set_newer(BACKENDS.cuda.matmul, "ieee"),
        set_newer(BACKENDS, "tf32"),
    ],
}


@pytest.mark.parametrize("like", [CPU, CUDA], ids=["cpu", "cuda"])
@pytest.mark.parametrize("name", list(SETTINGS))
def test_all_is_full_inside_and_as_it_was_after(name, like):
    SETTINGS[name]()
    before = state()
    for products_only in (False, True):
        with full_precision(like, products_only=products_only):
            operations = OPERATIONS["cuda" if like.is_cuda else "mkldnn"]
            held = operations[:1] if products_only else operations
            assert all(operation.fp32_precision in ("ieee", "none") for operation in held)
        assert state() == before
    with pytest.raises(KeyError), full_precision(like):
        raise KeyError
    assert state() == before


def test_what_followed_the_setting_for_all_still_follows_it():
    BACKENDS.fp32_precision = "tf32"
    with full_precision(CUDA, products_only=False), full_precision(CPU, products_only=False):
        pass
    BACKENDS.fp32_precision = "ieee"
    assert BACKENDS.cuda.matmul.fp32_precision == BACKENDS.mkldnn.conv.fp32_precision == "ieee"


def test_a_thread_that_leaves_takes_nothing_from_another():
    torch.set_float32_matmul_precision("medium")
    first_in, second_in, first_out = threading.Event(), threading.Event(), threading.Event()

    def first():
        with full_precision(CPU):
            first_in.set()
            second_in.wait(30)
        first_out.set()

    thread = threading.Thread(target=first)
    thread.start()
    assert first_in.wait(30)
    with full_precision(CPU):
        second_in.set()
        assert first_out.wait(30)
        assert BACKENDS.mkldnn.matmul.fp32_precision == "ieee"
    thread.join()
    assert BACKENDS.mkldnn.matmul.fp32_precision == "bf16"
    assert torch.get_float32_matmul_precision() == "medium"


class Watches(TorchDispatchMode):
    """Notes at what precision each product and convolution is computed."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("mm", "mv", "bmm", "addmm", "addmv", "baddbmm", "dot", "convolution_backward"):
            kind = BACKENDS.mkldnn.conv if "convolution" in name else BACKENDS.mkldnn.matmul
            self.seen.append((name, kind.fp32_precision))
        return function(*args, **(kwargs or {}))


def linear(n, m):
    return nn.Parameter(torch.zeros(m, n)), nn.Parameter(torch.zeros(m))


def outer():
    return Outer(linear(3, 2), torch.randn(5, 3), torch.randn(5, 2))


@pytest.mark.parametrize("kind", ["held", "outer", "outers", "ghost"])
def test_weighted_sums_are_computed_in_full_precision(kind):
    part = {
        "held": lambda: Held(linear(3, 2), [torch.randn(5, 6), torch.randn(5, 2)]),
        "outer": outer,
        "outers": lambda: Outers([outer(), outer()]),
        "ghost": lambda: Ghost(linear(3, 2), torch.randn(5, 4, 3), torch.randn(5, 4, 2)),
    }[kind]()
    BACKENDS.fp32_precision = "bf16"
    with Watches() as watches:
        part.weighted_sums(torch.ones(5).double(), None)
    assert watches.seen
    assert all(precision == "ieee" for _, precision in watches.seen), watches.seen
    assert BACKENDS.mkldnn.matmul.fp32_precision == "bf16"


def test_both_backward_passes_of_ghost_clipping_are_in_full_precision():
    model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6, 3))
    batch = [torch.randn(4, 1, 5), torch.randint(3, (4,))]
    BACKENDS.fp32_precision = "bf16"
    forward = []
    model[3].register_forward_hook(lambda *_: forward.append(BACKENDS.mkldnn.matmul.fp32_precision))
    with (
        per_example_clipper(model, CROSS_ENTROPY, clip_norm=1.0, engine="ghost") as clipper,
        Watches() as watches,
    ):
        clipper.clipped_sum(batch)
    assert forward == ["bf16"]  # once, and both passes go back through what it left
    backward = [seen for seen in watches.seen if seen[0] != "addmm"]
    assert {name for name, _ in backward} >= {"mm", "convolution_backward"}
    assert all(precision == "ieee" for _, precision in backward), backward
    assert BACKENDS.mkldnn.conv.fp32_precision == "bf16"


def test_stacked_sums_are_in_full_precision():
    stack = StackedDPSGD(
        [nn.Sequential(nn.Linear(3, 1)) for _ in range(2)],
        [TensorDataset(torch.randn(9, 3), torch.randn(9, 1)) for _ in range(2)],
        config=DPSGDConfig(
            sampling_rate=1.0,
            steps_per_round=1,
            planned_rounds=10,
            clip_norm=1.0,
            expected_batch_size=9,
            delta=1e-3,
            noise_multiplier=2.0,
        ),
        loss_fn=nn.MSELoss(reduction="none"),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        ledgers=[NodeLedger("a"), NodeLedger("b")],
        example=(torch.zeros(3), torch.zeros(1)),
        device="cpu",
    )
    assert stack.stacked
    BACKENDS.fp32_precision = "bf16"
    with Watches() as watches:
        stack.train()
    assert watches.seen and all(precision == "ieee" for _, precision in watches.seen)
