import copy
import multiprocessing
import os
import pickle
import random
import signal
import threading
import time
from fractions import Fraction
from itertools import permutations

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from scipy import stats

from dpfl_flower import rng as rng_module
from dpfl_flower.rng import SecureRandom, SeededRandom, secure
from tests.support.goodness import ACCEPT, REJECT, correlation_in_errors
from tests.support.scripted_random import ScriptedRandom, constant_seeds

# Python 3.12 warns of any fork while threads live; that these are survived is what is tested.
forks = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
LAST = 2**64 - 1


def in_child(work):
    """Return the bytes that ``work()`` gives in a forked child, which gets 20 seconds."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        failed = 1
        try:
            signal.alarm(20)
            os.close(reading)
            with os.fdopen(writing, "wb") as pipe:
                pipe.write(work())
            failed = 0
        finally:
            os._exit(failed)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    assert status == 0, "the child died"
    return answer


def shared_words(a, b):
    return np.intersect1d(np.frombuffer(a, "<u8"), np.frombuffer(b, "<u8")).size


# --- the generator ---------------------------------------------------------------------------


def test_the_stream_is_aes_256_in_counter_mode():
    key = bytes(range(32))
    counters = b"".join(i.to_bytes(16, "big") for i in range(5000))
    expected = Cipher(algorithms.AES(key), modes.ECB()).encryptor().update(counters)
    stream = rng_module._Keystream(key)
    assert stream.take(5) + stream.take(65536) + stream.take(14459) == expected


def test_only_os_keyed_bytes_protect():
    assert secure().protects is True
    assert SecureRandom().protects is True
    assert SeededRandom(0).protects is False


def test_secure_is_one_object_per_process():
    assert secure() is secure()


def test_secure_streams_share_nothing_whatever_is_seeded():
    seen = []
    for _ in range(3):
        constant_seeds()
        seen += [secure().random_bytes(80_000), SecureRandom().random_bytes(80_000)]
    for i, a in enumerate(seen):
        assert not any(shared_words(a, b) for b in seen[:i])


def test_seeds_elsewhere_are_neither_used_nor_moved():
    constant_seeds()
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    secure().gaussian(1000)
    secure().sample(range(100), 10)
    assert random.getstate() == before[0]
    assert (np.random.get_state()[1] == before[1]).all()
    assert torch.equal(torch.get_rng_state(), before[2])


def test_bits_are_balanced_and_runs_as_long_as_chance_makes_them():
    # NIST SP 800-22, monobit and runs tests, and a chi-square on the bytes.
    data = np.frombuffer(secure().random_bytes(1_000_000), np.uint8)
    bits = np.unpackbits(data)
    assert abs(bits.sum() - bits.size / 2) / np.sqrt(bits.size / 4) < 5
    runs = np.count_nonzero(bits[1:] != bits[:-1])
    assert abs(runs - bits.size / 2) / np.sqrt(bits.size / 4) < 5
    assert stats.chisquare(np.bincount(data, minlength=256)).pvalue > ACCEPT


@pytest.mark.parametrize("n", [0, 1, 7, 65535, 65536, 65537, 200_001])
def test_random_bytes_has_the_length_asked_for(n):
    assert len(secure().random_bytes(n)) == n
    assert len(SeededRandom(1).random_bytes(n)) == n


@pytest.mark.parametrize("n", [-1, 1.5, "8"])
def test_impossible_lengths_are_refused(n):
    for draw in (secure().random_bytes, SeededRandom(1).random_bytes, secure().uint64):
        with pytest.raises(ValueError, match="n="):
            draw(n)


def test_a_key_serves_a_bounded_number_of_bytes(monkeypatch):
    monkeypatch.setattr(rng_module, "_BYTES_PER_KEY", 100_000)
    keys = []
    urandom = os.urandom
    monkeypatch.setattr(os, "urandom", lambda n: keys.append(urandom(n)) or keys[-1])
    generator = SecureRandom()
    whole = generator.random_bytes(1_000_000)  # in one call, and below in many
    assert 7 <= len(keys) <= 10
    for _ in range(1000):
        generator.random_bytes(1000)
    assert 16 <= len(keys) <= 20
    assert len(set(keys)) == len(keys) and {len(key) for key in keys} == {32}
    assert np.unique(np.frombuffer(whole, "<u8")).size == len(whole) // 8


def test_threads_share_one_stream_and_no_byte_twice():
    generator, drawn = SeededRandom(5), []

    def work():
        for _ in range(300):
            drawn.append(generator.random_bytes(1024))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    reference = SeededRandom(5)
    assert sorted(drawn) == sorted(reference.random_bytes(1024) for _ in range(8 * 300))


def test_threads_take_turns_at_the_cipher():
    class Cipher:
        inside = overlaps = 0

        def update(self, zeros):
            self.inside += 1
            self.overlaps += self.inside > 1
            time.sleep(0.001)
            self.inside -= 1
            return zeros

    stream = rng_module._Keystream(bytes(32))
    stream._encryptor = Cipher()
    threads = [threading.Thread(target=lambda: [stream.take(8) for _ in range(20)]) for _ in "four"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stream._encryptor.overlaps == 0
    assert stream.taken == 4 * 20 * 8


def test_a_copied_or_pickled_generator_does_not_repeat_the_stream():
    generator = SecureRandom()
    for other in (copy.copy(generator), copy.deepcopy(generator)):
        assert other.random_bytes(32) != generator.random_bytes(32)
    state = pickle.dumps(generator)
    twins = pickle.loads(state), pickle.loads(state)
    assert twins[0].random_bytes(32) != twins[1].random_bytes(32)


# --- forks -----------------------------------------------------------------------------------


@forks
def test_parent_child_and_sibling_streams_never_coincide_after_a_fork():
    secure().random_bytes(11)  # a key is in place before the fork
    first = in_child(lambda: secure().random_bytes(80_000))
    second = in_child(lambda: secure().random_bytes(80_000))
    grandchild = in_child(lambda: in_child(lambda: secure().random_bytes(80_000)))
    streams = [first, second, grandchild, secure().random_bytes(80_000)]
    for i, a in enumerate(streams):
        for b in streams[:i]:
            assert shared_words(a, b) == 0
            bits = [np.unpackbits(np.frombuffer(s, np.uint8)).astype(float) for s in (a, b)]
            assert correlation_in_errors(*bits) < 5.5


@forks
def test_a_seeded_stream_would_have_coincided():
    generator = SeededRandom(3)
    child = in_child(lambda: generator.random_bytes(80_000))
    assert shared_words(child, generator.random_bytes(80_000)) == 10_000


def _noise_of_worker(_):
    return secure().gaussian(50_000)


@forks
def test_forked_workers_draw_uncorrelated_noise():
    parent = secure().gaussian(50_000)
    with multiprocessing.get_context("fork").Pool(3) as pool:
        draws = [parent, *pool.map(_noise_of_worker, range(3), chunksize=1)]
    for i, a in enumerate(draws):
        assert all(correlation_in_errors(a, b) < 5.5 for b in draws[:i])
    assert correlation_in_errors(draws[0] + 0.1 * draws[1], draws[1]) > 5.5  # has power


@forks
def test_a_fork_is_seen_even_where_the_process_id_comes_round_again(monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 4711)
    generator = SecureRandom()
    child = in_child(lambda: generator.random_bytes(8000))
    assert shared_words(child, generator.random_bytes(8000)) == 0


@forks
def test_a_fork_is_seen_by_its_process_id_where_python_was_not_told(monkeypatch):
    generator = SecureRandom()

    def as_if_forked_by_c_code():
        rng_module._forks -= 1
        return generator.random_bytes(8000)

    child = in_child(as_if_forked_by_c_code)
    assert shared_words(child, generator.random_bytes(8000)) == 0


@forks
def test_a_fork_while_another_thread_draws_does_not_block_the_child():
    generator = SecureRandom()
    held, release = threading.Event(), threading.Event()

    def hold():
        with generator._keystream._lock:
            held.set()
            release.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert held.wait(60)
        assert len(in_child(lambda: generator.random_bytes(100))) == 100
    finally:
        release.set()
        thread.join()


# --- the seeded source -----------------------------------------------------------------------


def test_a_seed_fixes_the_stream_however_it_is_asked_for():
    pieces = SeededRandom(9)
    whole = SeededRandom(9).random_bytes(200_000)
    taken = b"".join(pieces.random_bytes(n) for n in (1, 0, 15, 64, 70_000, 129_920))
    assert taken == whole
    assert SeededRandom(10).random_bytes(200_000) != whole
    assert (SeededRandom(9).gaussian(9) == SeededRandom(9).gaussian(9)).all()


def test_seeds_of_any_size_differ_and_negative_ones_are_refused():
    streams = {SeededRandom(s).random_bytes(16) for s in (0, 1, 2**64, 2**64 + 1, np.int64(7))}
    assert len(streams) == 5
    with pytest.raises(ValueError, match="seed=-1"):
        SeededRandom(-1)


# --- draws -----------------------------------------------------------------------------------


def test_uint64_is_the_stream_as_little_endian_words():
    words = SeededRandom(2).uint64(20_000)
    assert words.dtype == np.uint64 and words.flags.writeable
    assert words.tobytes() == SeededRandom(2).random_bytes(160_000)


@pytest.mark.parametrize("bound", [2, 3, 7, 10, 100, 255, 256, 257])
def test_below_is_uniform(bound):
    generator = SeededRandom(bound)
    counts = np.bincount([generator.below(bound) for _ in range(20_000)], minlength=bound)
    assert counts.size == bound
    assert stats.chisquare(counts).pvalue > ACCEPT


def test_below_rejects_instead_of_folding_the_excess_back():
    # Folding 0..255 into 0..199 would make 0..55 twice as likely; those bytes are drawn again.
    class Bytes(ScriptedRandom):
        def __init__(self, data):
            self._bytes = data

    assert Bytes(bytes([255, 200, 199])).below(200) == 199
    assert Bytes(bytes([0])).below(200) == 0


def test_below_covers_bounds_beyond_a_word():
    bound = 3 * 2**100
    draws = [SeededRandom(s).below(bound) for s in range(3000)]
    assert min(draws) >= 0 and max(draws) < bound
    assert stats.kstest([d / bound for d in draws], "uniform").pvalue > ACCEPT
    assert secure().below(1) == 0


@pytest.mark.parametrize("bound", [0, -3, 2.5])
def test_below_refuses_bounds_without_a_value_below_them(bound):
    with pytest.raises(ValueError, match="bound="):
        secure().below(bound)


@pytest.mark.parametrize("probability", [0.001, 0.1, 0.5, 0.97])
def test_coins_show_the_stated_probability_and_no_other(probability):
    n = 2_000_000
    heads = int(SeededRandom(4).coins(probability, n).sum())
    assert stats.binomtest(heads, n, probability).pvalue > ACCEPT
    if probability >= 0.1:
        wrong = probability * 1.03 if probability < 0.9 else 1 - (1 - probability) * 1.03
        assert stats.binomtest(heads, n, wrong).pvalue < REJECT


def test_coins_are_exact_at_the_ends():
    extremes = [0, LAST, 1, 2**63]
    assert not ScriptedRandom(extremes).coins(0, 4).any()
    assert ScriptedRandom(extremes).coins(1, 4).all()
    assert ScriptedRandom(extremes).coins(1.0, 4).all()
    assert ScriptedRandom([2**63 - 1, 2**63]).coins(0.5, 2).tolist() == [True, False]


def test_coins_are_never_above_the_stated_probability():
    assert ScriptedRandom([0, 1]).coins(2.0**-64, 2).tolist() == [True, False]
    assert ScriptedRandom([0, 1]).coins(2.0**-65, 2).tolist() == [False, False]
    almost = 1 - 2.0**-53
    assert ScriptedRandom([2**64 - 2**11]).coins(almost, 1).tolist() == [False]
    for probability in (0.1, 1 / 3, 1e-17, 3e-18):
        threshold = int(Fraction(probability) * 2**64)  # floor
        coins = ScriptedRandom([threshold - 1, threshold] if threshold else [0, 1])
        assert coins.coins(probability, 2).tolist() == [threshold > 0, False]


@pytest.mark.parametrize("probability", [-0.1, 1.0000001, float("nan"), "0.5", True])
def test_coins_refuse_what_is_no_probability(probability):
    with pytest.raises(ValueError, match="probability="):
        secure().coins(probability, 1)


def test_sample_makes_every_ordered_choice_equally_likely():
    generator = SeededRandom(8)
    for size, k in ((5, 2), (4, 4), (6, 1)):
        choices = list(permutations(range(size), k))
        draws = [tuple(generator.sample(range(size), k)) for _ in range(30_000)]
        counts = [draws.count(choice) for choice in choices]
        assert sum(counts) == len(draws), "an item came twice"
        assert stats.chisquare(counts).pvalue > ACCEPT


def test_sample_takes_positions_of_any_sequence():
    assert sorted(secure().sample("aabc", 4)) == ["a", "a", "b", "c"]
    assert secure().sample([], 0) == []
    assert sorted(secure().sample(range(3000), 3000)) == list(range(3000))
    large = secure().sample(range(10**12), 50)
    assert len(set(large)) == 50 and max(large) > 10**9


def test_sample_draws_biased_words_again():
    # 2^64 mod 3 = 1: with word 0 kept, offset 0 would have one word more than the others.
    script = ScriptedRandom([0, 2 << 6])
    assert script.sample("abc", 1) == ["c"]
    assert len(script._bytes) == 7, "the second draw was to take one byte"


@pytest.mark.parametrize("k", [-1, 4, 1.5])
def test_sample_refuses_impossible_sizes(k):
    with pytest.raises(ValueError, match=f"k={k}"):
        secure().sample([1, 2, 3], k)


def test_gaussian_is_standard_normal_and_would_be_caught_3_percent_off():
    draws = SeededRandom(6).gaussian(1_000_000)
    assert draws.dtype == np.float64
    assert stats.kstest(draws, "norm").pvalue > ACCEPT
    for wrong in (1.03, 1 / 1.03):
        assert stats.kstest(draws * wrong, "norm").pvalue < REJECT
    assert abs(np.square(draws).mean() - 1) < 5 * np.sqrt(2 / draws.size)
    beyond_4 = int((np.abs(draws) > 4).sum())
    assert stats.binomtest(beyond_4, draws.size, 2 * stats.norm.sf(4)).pvalue > ACCEPT


def test_gaussian_is_finite_and_symmetric_at_the_ends_of_the_words():
    low, just_below, just_above, high = ScriptedRandom([2**63, LAST, 0, 2**63 - 1]).gaussian(4)
    assert 8.2 < high < 8.3 and low == -high
    assert 0 < just_above < 1e-15 and just_below == -just_above


def test_gaussian_inverts_the_cdf():
    words = SeededRandom(1).uint64(1000)
    signed = (words.view(np.int64) >> 11) + 0.5
    expected = stats.norm.ppf(0.5 + signed * 2.0**-53)
    np.testing.assert_allclose(ScriptedRandom(words).gaussian(1000), expected, rtol=1e-12)
