from __future__ import annotations

import hashlib
import math
import random

import numpy as np
import pytest
import torch

from tuner import counted

# numpy promises the stream of a bit generator (here Philox), not that of Generator's methods (NEP 19). So
# uniform, choice and permutation, made from raw bits, should hold for every numpy; normal could change
# with one, and this test is what would say so: every seed would then mean another run.


def test_golden_values() -> None:
    assert raw("noise") == 8473088623274440027
    assert counted.uniform(1, 2, 3, "timestep") == 630537 / 2**24
    assert counted.choice(1000, 1, 2, 3, "caption") == 592
    assert counted.choice([0.2, 0.0, 0.5, 0.3], 1, 2, 3, "caption") == 2
    assert counted.permutation(10, 1, 2).tolist() == [7, 1, 6, 2, 3, 9, 0, 5, 4, 8]
    noise = [-0.8680955171585083, 1.1411951780319214, -0.4032669961452484, -1.5814183950424194]
    assert counted.normal((4,), 1, 2, 3, "noise").tolist() == noise
    counted.seed_libraries(1, 2, 3, 0)
    assert torch.initial_seed() == 1432639368035730083
    assert (random.random(), np.random.random()) == (0.7663219762023338, 0.49932857151732046)


def test_the_bits_are_those_of_philox_in_plain_python() -> None:
    """Independent of numpy: Philox 4x64 with 10 rounds, as Salmon et al. (2011) define it."""
    mask = 2**64 - 1
    for purpose in ("noise", "timestep", "order"):
        digest = hashlib.blake2b(
            f"1,2,3:{purpose}".encode(), digest_size=16, person=b"tuner.counted.1"
        ).digest()
        key = [int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")]
        x = [1, 0, 0, 0]  # numpy counts up before it draws
        for _ in range(10):
            even, odd = 0xD2E7470EE14C6C93 * x[0], 0xCA5A826395121157 * x[2]
            x = [odd >> 64 ^ x[1] ^ key[0], odd & mask, even >> 64 ^ x[3] ^ key[1], even & mask]
            key = [key[0] + 0x9E3779B97F4A7C15 & mask, key[1] + 0xBB67AE8584CAA73B & mask]
        assert raw(purpose) == x[0]


def raw(purpose: str) -> int:
    bits = counted.generator(1, 2, 3, purpose=purpose).bit_generator
    assert isinstance(bits, np.random.Philox)
    return int(bits.random_raw())


def test_draws_do_not_depend_on_order() -> None:
    positions = list(range(20))

    def draw(position: int) -> tuple[bytes, float, int]:
        noise = counted.normal((4, 2, 2), 7, 1, position, "noise").tobytes()
        uniform = counted.uniform(7, 1, position, "t")
        return noise, uniform, counted.choice(1000, 7, 1, position, "caption")

    forwards = {position: draw(position) for position in positions}
    np.random.seed(0)
    random.seed(0)
    torch.manual_seed(0)
    backwards = {position: draw(position) for position in reversed(positions)}
    assert forwards == backwards and len(set(forwards.values())) == 20


def test_the_global_generators_are_left_alone() -> None:
    before = (torch.get_rng_state(), np.random.get_state()[1].tobytes(), random.getstate())  # type: ignore[index, union-attr]
    counted.normal((8,), 0, 0, 0, "noise")
    counted.uniform(0, 0, 0, "t")
    counted.choice(3, 0, 0, 0, "caption")
    counted.permutation(8, 0, 0)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (np.random.get_state()[1].tobytes(), random.getstate())  # type: ignore[index, union-attr]


def test_every_part_of_the_key_matters() -> None:
    keys = [
        (s, e, p, name) for s in (0, 1, -1) for e in (0, 1) for p in (0, 1, 11) for name in ("a", "b", "é")
    ]
    drawn = {counted.normal((2,), *key).tobytes() for key in keys}
    assert len(keys) == 54 and len(drawn) == 54


def test_keys_are_not_confused() -> None:
    tuples = [(1, 23), (12, 3), (123,), (1, 2, 3), (0, 123), (123, 0)]
    drawn = {counted.generator(*numbers, purpose="x").random() for numbers in tuples}
    drawn.add(counted.generator(1, purpose="23:x").random())
    drawn.add(counted.generator(1, 23, purpose=":x").random())
    assert len(drawn) == 8


def test_numpy_whole_numbers_are_the_same_key() -> None:
    assert counted.uniform(5, 6, 7, "t") == counted.uniform(int(np.int64(5)), np.int32(6), np.int64(7), "t")  # type: ignore[arg-type]


def kolmogorov_smirnov(ordered: list[float], cumulative: list[float]) -> float:
    """sqrt(n) times the largest gap between the empirical and the true cumulative distribution."""
    n = len(ordered)
    gaps = [max((i + 1) / n - c, c - i / n) for i, c in enumerate(cumulative)]
    return math.sqrt(n) * max(gaps)


def test_normal_is_standard_normal() -> None:
    noise = counted.normal((4, 50, 50), 3, 0, 0, "noise")
    assert noise.shape == (4, 50, 50) and noise.dtype == np.float32
    values = sorted(noise.astype(np.float64).ravel().tolist())
    # Four standard errors for the moments; 1.95 is the 0.1 % point of the Kolmogorov distribution.
    assert abs(np.mean(values)) < 4 / math.sqrt(10000)
    assert abs(np.var(values) - 1) < 4 * math.sqrt(2 / 10000)
    assert kolmogorov_smirnov(values, [0.5 * (1 + math.erf(v / math.sqrt(2))) for v in values]) < 1.95


def test_first_draws_of_neighbouring_positions_are_independent() -> None:
    first = np.array(
        [counted.normal((1,), 3, 0, position, "noise")[0] for position in range(4000)], np.float64
    )
    assert abs(first.mean()) < 4 / math.sqrt(4000)
    assert abs(first.var() - 1) < 4 * math.sqrt(2 / 4000)
    assert abs((first[1:] * first[:-1]).mean()) < 4 / math.sqrt(3999)
    other = np.array(
        [counted.normal((1,), 3, 1, position, "noise")[0] for position in range(4000)], np.float64
    )
    assert abs((first * other).mean()) < 4 / math.sqrt(4000)


def test_uniform_is_uniform_and_stays_below_one_in_float32() -> None:
    values = sorted(counted.uniform(3, 0, position, "t") for position in range(4000))
    assert values[0] >= 0
    assert values[-1] < 1
    assert kolmogorov_smirnov(values, values) < 1.95
    assert all(float(np.float32(v)) == v for v in values)


def test_choice_follows_its_weights() -> None:
    weights = [1.0, 0.0, 3.0, 4.0, 0.0]
    counts = np.bincount(
        [counted.choice(weights, 3, 0, position, "caption") for position in range(4000)], minlength=5
    )
    assert counts[1] == counts[4] == 0
    expected = np.array([500.0, 1500.0, 2000.0])
    assert ((counts[[0, 2, 3]] - expected) ** 2 / expected).sum() < 13.8  # 0.1 % point, 2 degrees


def test_choice_of_a_number_of_options_is_even() -> None:
    counts = np.bincount(
        [counted.choice(7, 3, 0, position, "caption") for position in range(4200)], minlength=7
    )
    assert len(counts) == 7 and ((counts - 600) ** 2 / 600).sum() < 22.5  # 0.1 % point, 6 degrees
    assert counted.choice(1, 3, 0, 0, "caption") == 0
    assert counted.choice([0.0, 1e-300], 3, 0, 0, "caption") == 1


def test_choice_at_the_very_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [0.0, 1.0, 0.1, 0.0]
    monkeypatch.setattr(counted, "_raw", lambda *key, purpose: 0)
    assert counted.choice(weights, 0, 0, 0, "caption") == 1
    assert counted.choice(5, 0, 0, 0, "caption") == 0
    monkeypatch.setattr(counted, "_raw", lambda *key, purpose: 2**64 - 1)
    assert counted.choice(weights, 0, 0, 0, "caption") == 2
    assert counted.choice([5e-324, 0.0], 0, 0, 0, "caption") == 0  # where the product rounds up to the sum
    assert counted.choice(5, 0, 0, 0, "caption") == 4
    assert counted.uniform(0, 0, 0, "t") == 1 - 2**-24


@pytest.mark.parametrize("options", [0, -1, [], [0.0, 0.0], [1.0, -1.0], [math.nan], [math.inf, 1.0]])
def test_impossible_choices_are_errors(options: int | list[float]) -> None:
    with pytest.raises(ValueError):
        counted.choice(options, 0, 0, 0, "caption")


def test_permutation_is_one_and_changes_with_the_epoch() -> None:
    found = [counted.permutation(100, 5, epoch) for epoch in range(4)]
    assert all(order.dtype == np.int64 for order in found)
    assert all(sorted(order.tolist()) == list(range(100)) for order in found)
    assert len({order.tobytes() for order in found}) == 4
    assert counted.permutation(100, 6, 0).tolist() != found[0].tolist()
    assert counted.permutation(0, 5, 0).tolist() == [] and counted.permutation(1, 5, 0).tolist() == [0]


def test_all_permutations_are_equally_likely() -> None:
    counts: dict[tuple[int, ...], int] = {}
    for epoch in range(4800):
        order = tuple(counted.permutation(4, 5, epoch).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24 and sum(counts.values()) == 4800
    assert sum((n - 200) ** 2 / 200 for n in counts.values()) < 49.7  # 0.1 % point, 23 degrees


def library_draws() -> tuple[float, float, float, tuple[float, ...]]:
    dropped = torch.nn.functional.dropout(torch.ones(64), 0.5)
    return (torch.rand(()).item(), float(np.random.random()), random.random(), tuple(dropped.tolist()))


def test_libraries_are_seeded_by_step_and_rank() -> None:
    keys = [(s, step, micro, rank) for s in (0, 9) for step in (0, 1) for micro in (0, 1) for rank in (0, 1)]
    drawn = {}
    for key in keys:
        counted.seed_libraries(*key)
        drawn[key] = library_draws()
    assert len(drawn) == 16
    for source in range(4):
        assert len({values[source] for values in drawn.values()}) == 16
    for key in reversed(keys):
        random.random()
        counted.seed_libraries(*key)
        assert library_draws() == drawn[key]
