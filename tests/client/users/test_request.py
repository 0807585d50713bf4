"""A request survives the wire unchanged, and a node takes nothing in it on trust."""

import pytest
from flwr.app import ConfigRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto

from dpfl_flower.client.users import CohortRequest
from dpfl_flower.quantize import IntegerGrid, Rounding

GRID = IntegerGrid.for_noise_multiplier(1.1, 70, indicator_noise=5.0)
DITHERED = IntegerGrid.for_noise_multiplier(1.1, 70, rounding=Rounding.DITHERED)


def request(**changes):
    arguments = {"grid": GRID, "clip_norm": 0.3, "server_round": 2, "sampling_rate": 0.05}
    return CohortRequest(**(arguments | changes))


@pytest.mark.parametrize(
    "asked",
    [
        request(),
        request(grid=DITHERED, dither_seed=b"\x00public\xff"),
        request(sampling_rate=None, users=(4, 0, 17)),
        request(sampling_rate=None, users=("ann", "bob")),
        request(sampling_rate=None, users=()),
        request(sampling_rate=1),
    ],
)
def test_a_request_is_the_same_after_the_wire(asked):
    sent = RecordDict({"cohort": asked.to_config()})
    received = recorddict_from_proto(recorddict_to_proto(sent))
    assert CohortRequest.from_config(received.config_records["cohort"]) == asked


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        ({"sampling_rate": 0.0}, "sampling_rate=0.0"),
        ({"sampling_rate": 1.5}, "sampling_rate=1.5"),
        ({"sampling_rate": float("nan")}, "sampling_rate=nan"),
        ({"sampling_rate": None}, "exactly one"),
        ({"users": (1,)}, "exactly one"),
        ({"sampling_rate": None, "users": (1, 1)}, "nobody twice"),
        ({"sampling_rate": None, "users": (1, "1")}, "all int or all str"),
        ({"sampling_rate": None, "users": (True, False)}, "all int or all str"),
        ({"clip_norm": 0.0}, "clip_norm=0.0"),
        ({"clip_norm": float("inf")}, "clip_norm=inf"),
        ({"server_round": 0}, "server_round=0"),
        ({"dither_seed": b"x"}, "dither_seed"),
        ({"grid": DITHERED}, "dither_seed"),
        ({"grid": DITHERED, "dither_seed": b""}, "dither_seed"),
    ],
)
def test_a_request_out_of_range_names_the_culprit(changes, culprit):
    with pytest.raises(ValueError, match=culprit):
        request(**changes)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dimension", 0),
        ("dimension", 70.0),
        ("dimension", True),
        ("sensitivity-units", 2**40),
        ("sensitivity-units", -1),
        ("sensitivity-units", 3),  # below the clip norm's own units
        ("clip-units", 0.0),
        ("clip-units", float("nan")),
        ("indicator-units", -5),
        ("norm", "l3"),
        ("norm", 2),
        ("rounding", "up"),
        ("clip-norm", "0.4"),
        ("server-round", 1.0),
        ("sampling-rate", 7.0),
        ("sampling-rate", True),
        ("dither-seed", "text"),
        ("users", 3),
        ("weight", 2.0),
    ],
)
def test_a_node_refuses_a_field_that_is_wrong(key, value):
    fields = dict(request().to_config())
    with pytest.raises(ValueError):
        CohortRequest.from_config(fields | {key: value})


@pytest.mark.parametrize("key", list(request().to_config()))
def test_a_node_refuses_a_request_without(key):
    fields = {k: v for k, v in request().to_config().items() if k != key}
    with pytest.raises(ValueError):
        CohortRequest.from_config(ConfigRecord(fields))
