"""The digest that a node computes is the server's, whatever way the message has come."""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from dpfl_flower.secagg import terms_of


def sent():
    rng = np.random.default_rng(0)
    return RecordDict(
        {
            "arrays": ArrayRecord(
                {
                    "z.weight": Array(rng.normal(size=(300, 4001)).astype(np.float32)),
                    "a.bias": Array(np.array(3.5)),
                    "none": Array(np.zeros((0, 3), np.float16)),
                }
            ),
            "update": ConfigRecord({"n": 1, "x": 1e-300, "seed": b"\0\xff", "names": ["b", "a"]}),
            "measured": MetricRecord({"loss": 0.1, "steps": [1, 2]}),
            "config": ConfigRecord({"server-round": 1, "lr": 0.1, "fast": True}),
        }
    )


def over_the_line(thing):
    """Take an object apart and put it together as Flower does on its way through a SuperLink."""
    parts = [over_the_line(child) for child in (thing.children or {}).values()]
    parts = dict(zip(thing.children or {}, parts, strict=True))
    return type(thing).inflate(thing.deflate(), parts or None)


def test_it_outlives_the_line():
    before = sent()
    after = over_the_line(before)
    assert after is not before
    np.testing.assert_array_equal(
        after["arrays"]["z.weight"].numpy(), before["arrays"]["z.weight"].numpy()
    )
    assert terms_of(after) == terms_of(before)


@pytest.mark.parametrize(
    ("record", "key", "value"),
    [
        ("update", "n", 1.0),
        ("update", "n", 2),
        ("update", "seed", b"\0\xfe"),
        ("update", "names", ["a", "b"]),
        ("config", "fast", 1),
        ("measured", "loss", 0.2),
        ("arrays", "a.bias", Array(np.array(3.25))),
        ("arrays", "a.bias", Array(np.array(3.5, np.float32))),
        ("arrays", "none", Array(np.zeros((3, 0), np.float16))),
        ("arrays", "more", Array(np.zeros(0, np.float16))),
    ],
)
def test_every_value_and_its_type_is_in_it(record, key, value):
    before, changed = terms_of(sent()), sent()
    changed[record][key] = value
    assert terms_of(changed) != before
    del changed[record][key]
    assert terms_of(changed) != before or key == "more"


def test_the_order_of_arrays_is_in_it():
    # Entries are added up by their places: in another order, one array's to another's.
    before, changed = terms_of(sent()), sent()
    arrays = list(changed["arrays"].items())
    changed["arrays"] = ArrayRecord(dict(reversed(arrays)))
    assert terms_of(changed) != before
    changed["arrays"] = ArrayRecord(dict(arrays))
    assert terms_of(changed) == before


def test_the_protocols_own_record_is_not():
    content = sent()
    content["secagg"] = ConfigRecord({"stage": 3})
    assert terms_of(content) == terms_of(sent())


def test_the_order_of_records_and_of_settings_is_in_it():
    # An app may take the first of several models.
    before, content = terms_of(sent()), sent()
    assert terms_of(RecordDict(dict(reversed(content.items())))) != before
    content["config"] = ConfigRecord(dict(reversed(content["config"].items())))
    assert terms_of(content) != before


def test_the_function_that_is_asked_is_in_it():
    assert terms_of(sent(), "train") == terms_of(sent())
    assert terms_of(sent(), "train.warmup") != terms_of(sent())
