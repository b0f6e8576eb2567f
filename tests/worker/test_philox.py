"""The random stream: the published vectors, and the bounds that pruning relies on."""

import numpy as np
import pytest

from worker import philox

# kat_vectors of Random123 1.14, philox4x32 10 rounds: counter, key, output.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def parse(line: str) -> list[np.ndarray]:
    return [np.array([int(word, 16)], np.uint64) for word in line.split()]


@pytest.mark.parametrize("counter, key, output", KNOWN_ANSWERS)
def test_philox_gives_the_published_known_answers(counter: str, key: str, output: str) -> None:
    assert philox.philox4x32(*parse(counter), *parse(key)).tolist() == [[int(word, 16) for word in output.split()]]


def test_philox_of_many_counters_equals_one_at_a_time() -> None:
    generator = np.random.default_rng(0)
    inputs = [generator.integers(0, 2**32, 3 * philox._CHUNK + 5, dtype=np.uint64) for _ in range(6)]
    together = philox.philox4x32(*inputs)
    for at in (0, 1, philox._CHUNK - 1, philox._CHUNK, len(together) - 1):
        alone = philox.philox4x32(*[column[at : at + 1] for column in inputs])
        assert (together[at] == alone[0]).all()


def test_seed_words_are_low_then_high() -> None:
    def one(value: int) -> np.ndarray:
        return np.array([value], np.uint64)

    got = philox.words(one(0x299F31D0A4093822), one(0x243F6A88), one(0x85A308D3), one(0x13198A2E), c3=0x03707344)
    assert got.tolist() == [[0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]]


def test_gumbel_noise_is_finite_within_its_bounds_and_rises_with_the_word() -> None:
    words = np.array([0, 1, 511, 512, 2**31, 2**32 - 513, 2**32 - 512, 2**32 - 1], np.uint64)
    noise = philox.gumbel(words)
    assert noise.dtype == np.float32 and np.isfinite(noise).all() and (np.diff(noise) >= 0).all()
    assert noise[0] == philox.GUMBEL_MIN and noise[-1] == philox.GUMBEL_MAX


def test_uniforms_are_exact_in_float32() -> None:
    steps = np.array([0, 1, 2**22, 2**23 - 2, 2**23 - 1], np.float64)
    uniforms = (steps + 0.5) * 2.0**-23
    assert (uniforms.astype(np.float32).astype(np.float64) == uniforms).all() and uniforms.astype(np.float32).max() < 1


def test_noise_has_the_mean_and_variance_of_a_gumbel() -> None:
    count = 200_000
    ids = np.arange(count, dtype=np.uint64)
    zeros = np.zeros(count, np.uint64)
    noise = philox.gumbel(philox.words(zeros + np.uint64(7), ids, zeros, zeros)).astype(np.float64)
    assert abs(noise.mean() - 0.5772157) < 0.005 and abs(noise.var() - np.pi**2 / 6) < 0.02
