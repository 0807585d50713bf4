"""CKKS: sums are exact at the extremes, keys are what they should be, rounds end as they should."""

import itertools
import sys

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from dpfl_flower.secagg import CKKS, RoundAbandoned, SecureSum, Session, SumRequest
from dpfl_flower.secagg.ckks_key import PublicKey, SecretKey, make_key
from dpfl_flower.secagg.ckks_messages import Encrypted, decode_request, encode
from dpfl_flower.secagg.digits import CAPACITY, MOST_PARTIES, SLOTS, DigitCode, error_bound
from tests.support.ckks import add, key_pair

NODES = (11, 12, 13, 14)
WIDTH = 6


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    return key_pair(tmp_path_factory.mktemp("key"))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return key_pair(tmp_path_factory.mktemp("other"))


# Exactness.


def test_slots_at_the_capacity_come_back_within_the_bound(keys):
    public, secret = keys
    rng = np.random.default_rng(1)
    worst = 0.0
    largest = CAPACITY - 1
    kinds = [
        np.full(SLOTS, largest),
        np.full(SLOTS, -largest),
        np.tile([largest, -largest], SLOTS // 2),
        rng.integers(-largest, largest + 1, SLOTS),
        np.eye(1, SLOTS, 7)[0] * largest,
    ]
    for whole in kinds:
        got = secret.decrypt(add(public, secret.encrypt(np.array([whole], float))))
        worst = max(worst, np.abs(got - whole).max())
    assert 0 < worst < error_bound(1)


@pytest.mark.parametrize("bits", [24, 40, 64])
def test_the_decrypted_sum_is_the_integer_sum_at_the_extreme_bound(keys, bits):
    public, secret = keys
    parties = 7
    code = DigitCode(width=1500, bits=bits, parties=parties)
    most = (2 ** (bits - 1) - 1) // parties
    rng = np.random.default_rng(bits)
    vectors = rng.integers(-most, most + 1, (parties, 1500))
    vectors[:, :500] = most
    vectors[:, 500:1000] = -most
    total = add(public, *(secret.encrypt(code.encode(vector)) for vector in vectors))
    got = code.decode(secret.decrypt(total), parties=parties)
    np.testing.assert_array_equal(got, vectors.sum(axis=0))


def test_residues_wrap_as_they_should(keys):
    public, secret = keys
    code = DigitCode(width=3, bits=16, parties=3)
    vectors = np.array([[65535, 32767, 5], [65535, 1, 5], [65535, 0, 65530]])
    total = add(public, *(secret.encrypt(code.encode(vector)) for vector in vectors))
    assert code.decode(secret.decrypt(total), parties=3).tolist() == [-3, -32768, 4]


# Keys.


def test_key_files_are_their_owners_and_never_overwritten(tmp_path):
    files = make_key(tmp_path / "new")
    assert {path.stat().st_mode & 0o777 for path in (files.nodes, files.server)} == {0o600}
    before = files.nodes.read_bytes()
    with pytest.raises(FileExistsError, match="not overwritten"):
        make_key(tmp_path / "new")
    files.nodes.rename(tmp_path / "moved")
    with pytest.raises(FileExistsError, match=r"server\.ckks"):
        make_key(tmp_path / "new")
    assert (tmp_path / "moved").read_bytes() == before


def test_the_halves_are_not_taken_for_each_other(tmp_path):
    files = make_key(tmp_path)
    swapped = tmp_path / "swapped"
    swapped.write_bytes(files.nodes.read_bytes()[32:])
    with pytest.raises(ValueError, match="the server must not have"):
        PublicKey.load(swapped)
    swapped.write_bytes(bytes(32) + files.server.read_bytes())
    swapped.chmod(0o600)
    with pytest.raises(ValueError, match="no secret key"):
        SecretKey.load(swapped)
    files.nodes.chmod(0o640)
    with pytest.raises(ValueError, match="mode 0640, must be 0600"):
        SecretKey.load(files.nodes)


@pytest.mark.parametrize("data", [b"", b"no key", bytes(1000)])
def test_a_file_that_is_no_key_is_refused(tmp_path, data):
    path = tmp_path / "key"
    path.write_bytes(data)
    path.chmod(0o600)
    for kind in (PublicKey, SecretKey):
        with pytest.raises(ValueError, match=r"no key of CKKS|holds no secret key|scale="):
            kind.load(path)


def test_the_server_cannot_decrypt(keys):
    public, secret = keys
    (data,) = secret.encrypt(np.ones((1, SLOTS)))
    with pytest.raises(ValueError, match="secret_key"):
        public.read(data).decrypt()


def test_another_key_gives_no_sum(keys, other):
    code = DigitCode(width=WIDTH, bits=24, parties=1)
    encrypted = keys[1].encrypt(code.encode(np.arange(WIDTH)))
    with pytest.raises(ValueError, match="a slot is larger than"):
        code.decode(other[1].decrypt(encrypted), parties=1)


def test_two_encryptions_of_one_vector_differ(keys):
    slots = np.ones((1, SLOTS))
    assert keys[1].encrypt(slots) != keys[1].encrypt(slots)


def test_without_the_extra_the_error_names_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tenseal", None)
    with pytest.raises(ImportError, match=r"pip install 'dpfl-flower\[ckks\]'"):
        make_key(tmp_path)


# Rounds.


def begun(public, nodes=NODES, bits=24, largest=None, **settings):
    request = SumRequest(
        session=Session(1, 3), nodes=nodes, width=WIDTH, bits=bits, seconds=60.0, largest=largest
    )
    return CKKS(key=public, **settings).begin(request)


def vector(node):
    return np.arange(WIDTH, dtype=np.int64) * node - 20


def encrypted(keys, nodes=NODES, *, of=vector, claimed=None):
    public, secret = keys
    code = DigitCode(width=WIDTH, bits=24, parties=len(NODES))
    key = Encrypted(key=public.fingerprint if claimed is None else claimed)
    return {node: encode(key, secret.encrypt(code.encode(of(node)))) for node in nodes}


def decrypted(keys, stage, nodes=None):
    """Return the answers of those that are asked to decrypt."""
    replies = {}
    for node, content in stage.requests.items():
        request, ciphertexts = decode_request(content)
        code = DigitCode(width=WIDTH, bits=24, parties=len(NODES))
        total = code.decode(keys[1].decrypt(ciphertexts), parties=len(request.survivors))
        replies[node] = answered(total)
    return {node: reply for node, reply in replies.items() if nodes is None or node in nodes}


def answered(total):
    return RecordDict({"masked": ArrayRecord({"sum": Array(total)})})


def test_a_round_gives_the_sum_of_whoever_answered(keys):
    stage = begun(keys[0])
    assert stage.carries_task
    assert set(stage.requests) == set(NODES)
    second = stage.receive(encrypted(keys, NODES[1:]))
    assert not second.carries_task
    assert second.stage != stage.stage
    assert set(second.requests) <= set(NODES[1:])
    total = second.receive(decrypted(keys, second))
    assert isinstance(total, SecureSum)
    assert total.survivors == NODES[1:]
    np.testing.assert_array_equal(total.total, sum(vector(node) for node in NODES[1:]))


@pytest.mark.parametrize("size", [3, 4])
def test_every_subset_that_is_large_enough_gives_its_own_sum(keys, size):
    answers = encrypted(keys)
    for there in itertools.combinations(NODES, size):
        second = begun(keys[0]).receive({node: answers[node] for node in there})
        for count in (1, 2):
            for answering in itertools.combinations(second.requests, count):
                total = second.receive(decrypted(keys, second, answering))
                assert total.survivors == there
                np.testing.assert_array_equal(total.total, sum(map(vector, there)))


def test_one_that_decrypts_is_enough_and_none_is_not(keys):
    second = begun(keys[0]).receive(encrypted(keys))
    asked = tuple(second.requests)
    assert len(asked) == 2
    for node in asked:
        total = second.receive(decrypted(keys, second, [node]))
        np.testing.assert_array_equal(total.total, sum(map(vector, NODES)))
    with pytest.raises(RoundAbandoned, match="none of 2"):
        second.receive({})
    with pytest.raises(RoundAbandoned, match="none of 2"):
        second.receive({99: answered(np.zeros(WIDTH, np.int64))})


def test_nodes_that_decrypt_differently_end_the_round(keys):
    second = begun(keys[0]).receive(encrypted(keys))
    replies = decrypted(keys, second)
    replies[next(iter(second.requests))] = answered(np.zeros(WIDTH, np.int64))
    with pytest.raises(RoundAbandoned, match="do not agree"):
        second.receive(replies)


def test_who_decrypts_takes_turns(keys):
    asked = set()
    for server_round in range(1, 5):
        request = SumRequest(
            session=Session(1, server_round), nodes=NODES, width=WIDTH, bits=24, seconds=60.0
        )
        stage = CKKS(key=keys[0], decryptors=1).begin(request).receive(encrypted(keys))
        asked |= set(stage.requests)
    assert asked == set(NODES)


def damaged(keys, other, kind):
    """Return a reply that is none."""
    good = encrypted(keys, [11])[11]
    (name,) = good.array_records["masked"]
    data = good.array_records["masked"][name].numpy()
    key = good.config_records["secagg"]
    replaced = {
        "cut": data[:-100],
        "empty": data[:0],
        "flipped": data ^ 0x55,
        "long": np.zeros(1 << 20, np.uint8),
        "words": data[: len(data) // 4 * 4].view(np.uint32),
        "flat-out": data.reshape(1, -1),
    }
    if kind in replaced:
        return RecordDict({"secagg": key, "masked": ArrayRecord({"0": Array(replaced[kind])})})
    if kind == "another key":
        return encrypted(other, [11])[11]
    import tenseal

    foreign = tenseal.context(
        tenseal.SCHEME_TYPE.CKKS,
        poly_modulus_degree=16384 if kind == "another ring" else 8192,
        coeff_mod_bit_sizes=[60, 60, 60],
        n_threads=1,
    )
    context = keys[1]._context if kind in {"another scale", "few slots"} else foreign
    made = tenseal.ckks_vector(
        context,
        [1.0] * (7 if kind == "few slots" else SLOTS),
        scale=2.0**40 if kind == "another scale" else 2.0**60,
    ).serialize()
    contents = {
        "none": RecordDict(),
        "no arrays": RecordDict({"secagg": key}),
        "two": encode(Encrypted(key=keys[0].fingerprint), [data.tobytes()] * 2),
        "stage": RecordDict({"secagg": ConfigRecord({"stage": "decrypt"})}),
        "unnamed": RecordDict({"secagg": key, "masked": ArrayRecord({"x": Array(data)})}),
    }
    return (
        contents[kind] if kind in contents else encode(Encrypted(key=keys[0].fingerprint), [made])
    )


DAMAGES = ("cut", "empty", "flipped", "long", "words", "flat-out", "another key", "another ring")
DAMAGES += ("another scale", "few slots", "none", "no arrays", "two", "stage", "unnamed")


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_malformed_ciphertext_is_a_dropout(keys, other, kind):
    replies = encrypted(keys) | {11: damaged(keys, other, kind)}
    second = begun(keys[0]).receive(replies)
    total = second.receive(decrypted(keys, second))
    assert total.survivors == NODES[1:]
    np.testing.assert_array_equal(total.total, sum(vector(node) for node in NODES[1:]))


@pytest.mark.parametrize(
    "total",
    [
        np.zeros(WIDTH, np.int32),
        np.zeros(WIDTH - 1, np.int64),
        np.full(WIDTH, 2**23),
        np.full(WIDTH, -(2**23) - 1),
        np.full(WIDTH, 401),
        np.full(WIDTH, -(2**63)),
    ],
)
def test_a_malformed_or_impossible_sum_is_none(keys, total):
    second = begun(keys[0], largest=100, decryptors=1).receive(encrypted(keys))
    (node,) = second.requests
    assert second.receive({node: answered(np.full(WIDTH, -400))}).total[0] == -400
    for reply in (answered(total), RecordDict()):
        with pytest.raises(RoundAbandoned):
            second.receive({node: reply})


def test_with_too_few_a_round_is_abandoned(keys):
    with pytest.raises(RoundAbandoned, match="2 of 2 nodes"):
        begun(keys[0], nodes=(1, 2))
    with pytest.raises(RoundAbandoned, match="2 of 4 nodes"):
        begun(keys[0]).receive(encrypted(keys, NODES[:2]))
    with pytest.raises(RoundAbandoned, match=r"0 of 4 .*: do the apps have mods=\[ckks_mod\]\?"):
        begun(keys[0]).receive({})


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"min_cohort": 1}, "min_cohort=1 must be >= 2"),
        ({"max_cohort": 2}, "max_cohort=2 must be >= min_cohort=3"),
        ({"max_cohort": MOST_PARTIES + 1}, "max_cohort=1048577"),
        ({"decryptors": 0}, "decryptors=0"),
        ({"key": b"key"}, "key="),
    ],
)
def test_settings_that_make_no_sense(keys, settings, match):
    with pytest.raises((TypeError, ValueError), match=match):
        CKKS(**{"key": keys[0]} | settings)


def test_more_than_can_be_summed_exactly_are_refused(keys):
    made = CKKS(key=keys[0])
    made.check_population(MOST_PARTIES)
    with pytest.raises(ValueError, match="nodes=1048577"):
        made.check_population(MOST_PARTIES + 1)
    with pytest.raises(ValueError, match="min_cohort=3"):
        made.check_population(2)
    assert made.colluders == 0
