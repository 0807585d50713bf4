"""Each primitive against a vector or a computation that is not its own."""

import itertools

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hmac import HMAC
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from dpfl_flower.rng import SeededRandom, secure
from dpfl_flower.secagg import Identity, Roster, Session, bits_without_wrap
from dpfl_flower.secagg.graph import neighbour_graph
from dpfl_flower.secagg.keys import KeyPair, commitment, is_usable
from dpfl_flower.secagg.masks import apply_masks
from dpfl_flower.secagg.modulus import Modulus
from dpfl_flower.secagg.sealing import OVERHEAD_BYTES, seal, unseal
from dpfl_flower.secagg.shamir import PRIME, SHARE_BYTES, combine, split

# RFC 7748, section 5.2, the first vector: scalar, point, and what they agree on.
SCALAR = bytes.fromhex("a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4")
POINT = bytes.fromhex("e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c")
AGREED = bytes.fromhex("c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552")
# AES-256 of the zero block under the zero key (NIST, AESAVS).
ZERO_BLOCK = bytes.fromhex("dc95c078a2408989ad48a21492842087")


def hmac(key, data):
    digest = HMAC(key, SHA256())
    digest.update(data)
    return digest.finalize()


# Key agreement.


def test_agreement_is_x25519_then_hkdf_over_label_and_both_keys():
    ours = KeyPair(SCALAR)
    info = b"label" + b"".join(sorted((ours.public, POINT)))
    extracted = hmac(bytes(32), AGREED)  # RFC 5869, section 2.2
    first = hmac(extracted, info + b"\x01")  # section 2.3
    second = hmac(extracted, first + info + b"\x02")
    assert ours.agree(POINT, b"label") == first
    assert ours.agree(POINT, b"label", length=64) == first + second


def test_both_ends_agree_and_another_label_gives_another_key():
    ours, theirs = (KeyPair.generate(secure()) for _ in range(2))
    first, second = (ours.agree(theirs.public, label) for label in (b"a", b"b"))
    assert (first, second) == tuple(theirs.agree(ours.public, label) for label in (b"a", b"b"))
    assert len({first, second, ours.agree(POINT, b"a")}) == 3
    assert KeyPair(ours.private, ours.public) == ours


@pytest.mark.parametrize("point", [bytes(32), b"\x01" + bytes(31), bytes(31), b""])
def test_a_public_key_that_everyone_agrees_with_on_zero_is_refused(point):
    assert not is_usable(point)
    with pytest.raises(ValueError):
        KeyPair.generate(secure()).agree(point, b"label")
    assert is_usable(POINT)


def test_no_secret_shows_in_a_representation():
    assert SCALAR.hex() not in repr(KeyPair(SCALAR))
    assert repr(SCALAR) not in repr(KeyPair(SCALAR))


def test_labels_tell_run_round_terms_packing_purpose_and_direction_apart():
    labels = [
        session.label(purpose, *parties)
        for session in (Session(1, 1), Session(1, 2), Session(2, 1))
        for purpose in ("seal", "mask", "keys")
        for parties in ((1, 2), (2, 1), (1,), ())
    ]
    assert len(set(labels)) == len(labels)
    assert Session(1, 1).pair_label("mask", 5, 3) == Session(1, 1).pair_label("mask", 3, 5)
    assert commitment(bytes(32), b"a") != commitment(bytes(32), b"b")
    told = [
        session.of_words(*words)
        for session in (Session(1, 1), Session(1, 1, b"a"), Session(1, 1, b"b"), Session(2, 1))
        for words in ((4, 32, 1), (5, 32, 1), (4, 64, 1), (4, 21, 3))
    ]
    for made in (lambda it: it.label("seal", 1, 2), lambda it: it.pair_label("mask", 1, 2)):
        assert len({made(session) for session in told}) == len(told)
    with pytest.raises(ValueError, match="64 bits"):
        Session(2**64, 1)


# Shamir.


def interpolated(shares):
    """Return the polynomial's coefficients, lowest first, from as many shares as it has."""
    rows = [[pow(x, k, PRIME) for k in range(len(shares))] + [y] for x, y in shares.items()]
    for column, row in enumerate(rows):
        inverse = pow(row[column], -1, PRIME)  # distinct x: no pivot is 0, by Vandermonde
        row[:] = [value * inverse % PRIME for value in row]
        for other in rows:
            if other is not row:
                factor = other[column]
                other[:] = [(a - factor * b) % PRIME for a, b in zip(other, row, strict=True)]
    return [row[-1] for row in rows]


def test_each_coefficient_of_each_secret_is_drawn_anew_over_the_whole_field():
    secret, found = bytes(32), []
    for _ in range(40):
        shares = split(secret, threshold=5, count=6, rng=secure())
        points = {x: int.from_bytes(shares[x - 1], "big") for x in range(1, 6)}
        constant, *drawn = interpolated(points)
        assert constant == 0
        found += drawn
    assert len(set(found)) == len(found) == 160
    # Each of 256 bits is set in some and clear in some: chance leaves one out by 2^-151.
    for bit in range(256):
        assert {coefficient >> bit & 1 for coefficient in found} == {0, 1}


# Masks.


@pytest.mark.parametrize("bits", [8, 16, 24, 32, 40, 64])
def test_a_mask_is_the_keystream_of_aes_256_in_counter_mode(bits):
    modulus, key, width = Modulus(bits), bytes(range(32)), 100_000
    words = modulus.zeros(width)
    apply_masks(words, add=[key])
    blocks = -(-words.nbytes // 16)
    counters = b"".join(i.to_bytes(16, "big") for i in range(blocks))
    stream = Cipher(algorithms.AES256(key), modes.ECB()).encryptor().update(counters)
    assert words.tobytes() == stream[: words.nbytes]


def test_the_first_block_of_the_zero_key_is_nists():
    words = Modulus(32).zeros(4)
    apply_masks(words, add=[bytes(32)])
    assert words.tobytes() == ZERO_BLOCK


@given(st.integers(1, 64), st.integers(1, 300), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_masks_come_off_without_a_trace(bits, width, seed):
    modulus = Modulus(bits)
    half = 1 << (bits - 1)
    rng = SeededRandom(seed)
    vector = np.array([rng.below(2 * half) - half for _ in range(width)], np.int64)
    words = modulus.words(vector)
    keys = [rng.random_bytes(32) for _ in range(3)]
    for key in keys:
        apply_masks(words, add=[key])
    for key in reversed(keys):
        apply_masks(words, subtract=[key])
    np.testing.assert_array_equal(modulus.signed(words), vector)


def test_a_short_key_is_refused():
    with pytest.raises(ValueError, match="31 bytes must have 32"):
        apply_masks(Modulus(32).zeros(1), add=[bytes(31)])


# The modulus.


@given(st.integers(1, 64), st.integers(1, 40), st.integers(1, 6), st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_packed_vectors_sum_as_integers_do_mod_2_to_the_b(bits, width, count, seed):
    modulus, rng = Modulus(bits), SeededRandom(seed)
    half = 1 << (bits - 1)
    parts = [[rng.below(2 * half) - half for _ in range(width)] for _ in range(count)]
    total = modulus.zeros(width)
    for part in parts:
        packed = modulus.pack(modulus.words(np.array(part, np.int64)))
        assert packed.size == modulus.packed_bytes(width) == width * -(-bits // 8)
        modulus.add_packed(total, packed)
    expected = [(sum(column) + half) % (2 * half) - half for column in zip(*parts, strict=True)]
    assert modulus.signed(total).tolist() == expected


@pytest.mark.parametrize("bits", [20, 24])
def test_packing_three_bytes_of_four_is_packing(bits):
    modulus = Modulus(bits)
    words = SeededRandom(1).uint64(1003).astype("<u4")
    packed = modulus.pack(words)
    low, high = packed[: 2 * 1003].view("<u2"), packed[2 * 1003 :]
    values = [int(a) + (int(b) << 16) for a, b in zip(low, high, strict=True)]
    assert values == [int(word) & ((1 << bits) - 1) for word in words]


def test_a_packed_vector_of_another_length_or_type_is_refused():
    modulus = Modulus(24)
    for wrong in (np.zeros(8, np.uint8), np.zeros(10, np.uint8), np.zeros(9, np.int8)):
        with pytest.raises(ValueError, match="must be uint8"):
            modulus.add_packed(modulus.zeros(3), wrong)


@given(st.integers(1, 2**40), st.integers(1, 2**22))
@settings(max_examples=200, deadline=None)
def test_bits_without_wrap_are_enough_and_one_byte_less_is_not(largest, parties):
    bits = bits_without_wrap(largest, parties)
    assert bits % 8 == 0
    assert largest * parties < 2 ** (bits - 1)
    assert bits == 8 or largest * parties >= 2 ** (bits - 9)


def test_a_sum_that_no_modulus_holds_is_refused():
    assert bits_without_wrap(2**40, 2**22) == 64
    with pytest.raises(ValueError, match=r"2\*\*63"):
        bits_without_wrap(2**40, 2**23)
    for bits in (0, 65):
        with pytest.raises(ValueError, match="bits="):
            Modulus(bits)


# Sharing.


def test_the_field_is_prime():
    # Miller and Rabin with 40 bases: a composite passes with probability below 4^-40.
    odd, twos = PRIME - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for _ in range(40):
        x = pow(2 + secure().below(PRIME - 4), odd, PRIME)
        powers = [pow(x, 2**i, PRIME) for i in range(twos)]
        assert x == 1 or PRIME - 1 in powers
    assert PRIME > 2**256


@pytest.mark.parametrize(("threshold", "count"), [(1, 1), (1, 3), (2, 3), (3, 5), (5, 5)])
def test_any_threshold_of_shares_gives_the_secret(threshold, count):
    secret = secure().random_bytes(32)
    shares = dict(enumerate(split(secret, threshold=threshold, count=count, rng=secure()), 1))
    for size in range(threshold, count + 1):
        for chosen in itertools.combinations(shares, size):
            assert combine({x: shares[x] for x in chosen}) == secret
    assert all(len(share) == SHARE_BYTES for share in shares.values())


def test_shares_lie_on_one_polynomial_however_many_coefficients_it_has():
    threshold, count, secret = 70, 90, secure().random_bytes(32)
    shares = dict(enumerate(split(secret, threshold=threshold, count=count, rng=secure()), 1))
    for first in (1, 11, 21):
        assert combine({x: shares[x] for x in range(first, first + threshold)}) == secret
    assert all(len(share) == SHARE_BYTES for share in shares.values())


def test_fewer_shares_fit_every_secret_equally():
    # For any other secret there is exactly one polynomial through it and the two shares.
    shares = split(bytes(32), threshold=3, count=5, rng=secure())
    value = {x: int.from_bytes(shares[x - 1], "big") for x in (2, 4)}
    for other in (1, 2**200, 2**256 - 1):
        # Lagrange at x = 5 through (0, other), (2, .), (4, .).
        third = (
            other * 3 * pow(8, -1, PRIME)
            + value[2] * 5 * pow(-4, -1, PRIME)
            + value[4] * 15 * pow(8, -1, PRIME)
        ) % PRIME
        made_up = {2: shares[1], 4: shares[3], 5: third.to_bytes(SHARE_BYTES, "big")}
        assert int.from_bytes(combine(made_up), "big") == other


@pytest.mark.parametrize("threshold", [2, 3, 5])
def test_one_share_less_than_the_threshold_does_not_give_the_secret(threshold):
    secret = secure().random_bytes(32)
    first, again = (
        dict(enumerate(split(secret, threshold=threshold, count=6, rng=secure()), 1))
        for _ in range(2)
    )
    assert not {*first.values()} & {*again.values(), bytes(1) + secret}
    for shares in (first, again):
        for size in range(1, threshold):
            for chosen in itertools.combinations(shares, size):
                try:
                    found = combine({x: shares[x] for x in chosen})
                except ValueError:
                    continue
                assert found != secret


def test_shares_that_are_none_are_refused():
    shares = dict(enumerate(split(bytes(32), threshold=2, count=3, rng=secure()), 1))
    for wrong in ({}, {0: shares[1]}, {1: shares[1][:-1]}, {1: PRIME.to_bytes(33, "big")}):
        with pytest.raises(ValueError):
            combine(wrong)
    with pytest.raises(ValueError, match="256 bits"):
        combine({1: (PRIME - 1).to_bytes(33, "big")})
    for threshold, count in ((0, 1), (3, 2)):
        with pytest.raises(ValueError, match="threshold="):
            split(bytes(32), threshold=threshold, count=count, rng=secure())
    with pytest.raises(ValueError, match="31 bytes"):
        split(bytes(31), threshold=1, count=1, rng=secure())


# Sealing.


def test_what_was_changed_or_meant_for_another_does_not_open():
    key, plain = secure().random_bytes(32), b"66 bytes of shares"
    sealed = seal(key, plain, b"to you", secure())
    assert unseal(key, sealed, b"to you") == plain
    assert len(sealed) == len(plain) + OVERHEAD_BYTES
    assert sealed != seal(key, plain, b"to you", secure())
    for i in range(len(sealed)):
        changed = sealed[:i] + bytes([sealed[i] ^ 1]) + sealed[i + 1 :]
        with pytest.raises(ValueError, match="do not open"):
            unseal(key, changed, b"to you")
    for wrong_key, wrong, label in ((bytes(32), sealed, b"to you"), (key, sealed, b"to me")):
        with pytest.raises(ValueError, match="do not open"):
            unseal(wrong_key, wrong, label)
    for short in (b"", bytes(5), bytes(12), bytes(20)):
        with pytest.raises(ValueError):
            unseal(key, short, b"to you")


# The graph.


@given(st.integers(2, 40), st.integers(1, 10), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_the_graph_is_regular_symmetric_and_without_loops(size, half, seed):
    nodes = [7 * i + 3 for i in range(size)]
    graph = neighbour_graph(nodes, 2 * half, SeededRandom(seed))
    assert {len(peers) for peers in graph.values()} == {min(2 * half, size - 1)}
    for node, peers in graph.items():
        assert node not in peers
        assert list(peers) == sorted(set(peers))
        assert all(node in graph[peer] for peer in peers)


def test_everyone_is_a_neighbour_by_default_and_the_circle_is_shuffled():
    assert neighbour_graph([1, 2, 3], None, secure())[2] == (1, 3)
    graphs = {str(neighbour_graph(list(range(20)), 4, SeededRandom(i))) for i in range(20)}
    assert len(graphs) == 20


# The roster.


def test_identities_and_rosters_are_read_as_ssh_and_openssl_write_them(tmp_path):
    keys = [Ed25519PrivateKey.generate() for _ in range(2)]
    ssh, pem, roster = (tmp_path / name for name in ("id", "id.pem", "roster"))
    ssh.write_bytes(keys[0].private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    pem.write_bytes(keys[1].private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    lines = [key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) for key in keys]
    roster.write_bytes(b"# hospitals\n\n" + lines[0] + b" cleveland\n" + lines[1] + b"\n")
    identities = [Identity.load(ssh), Identity.load(pem)]
    members = Roster.load(roster)
    assert members.members == {identity.public for identity in identities}
    assert members.vouches(identities[0].public, identities[0].sign(b"a"), b"a")
    assert not members.vouches(identities[0].public, identities[1].sign(b"a"), b"a")
    assert not members.vouches(identities[0].public, b"", b"a")
    stranger = Identity(Ed25519PrivateKey.generate())
    assert not members.vouches(stranger.public, stranger.sign(b"a"), b"a")


def test_files_that_hold_something_else_are_refused(tmp_path):
    file = tmp_path / "file"
    for content in ("", "# nobody\n", "ssh-ed25519 AAAA\n", "ssh-rsa AAAAB3NzaC1yc2E\n"):
        file.write_text(content)
        with pytest.raises(ValueError, match="file"):
            Roster.load(file)
        with pytest.raises(ValueError, match="Ed25519 private key"):
            Identity.load(file)
