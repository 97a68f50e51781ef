"""The noise: known answers, an independent implementation, the layout of `philox.py`, and statistics."""

import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ddpm_fast.kernels import philox
from ddpm_fast.kernels.dispatch import ptx
from ddpm_fast.kernels.philox import Stream
from ddpm_fast.kernels.philox_triton import philox_4x32, polar4
from ddpm_fast.kernels.philox_triton import uniform as uniform_triton
from tests.kernels.judges import MASK, noise, philox_4x32_10, uniform

# Random123, tests/kat_vectors: counter, key, result.
KNOWN = {
    "zeros": ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    "ones": ((MASK,) * 4, (MASK,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    "pi": (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
}
KNOWN_IDS = list(KNOWN)
SIZES = [1, 5, 63, 64, 65, 144, 145, 3072]
LARGEST = math.sqrt(66 * math.log(2))
# Float32: the angle, up to 2 pi, is rounded to 2.4e-7 and met by a radius of up to 6.8; the rest is smaller.
NORMAL_ATOL = 6e-4 if torch.cuda.is_available() else 4e-6
WORDS = st.integers(0, MASK)
DRAWS = 10**6
# Around every point where float32 drops another bit of the word, and both ends.
EDGES = sorted(
    {w for k in range(33) for d in (-2, -1, 0, 1, 2) if 0 <= (w := (1 << k) + d) <= MASK}
    | {MASK - d for d in (127, 128, 129, 256)}
)
SIGMAS = 5  # a statistic with a fixed seed fails beyond this many of its own standard deviations


@triton.jit
def words_kernel(counters_ptr, keys_ptr, words_ptr, PTX: tl.constexpr, BLOCK: tl.constexpr):
    """Row i: the four words of counter i under key i, the rest of the block idle."""
    i = tl.program_id(0)
    counter = counters_ptr + 4 * i
    j = tl.load(counter) + tl.arange(0, BLOCK)
    w0, w1, w2, w3 = philox_4x32(
        tl.load(keys_ptr + i), j, tl.load(counter + 1), tl.load(counter + 2), tl.load(counter + 3), PTX
    )
    o_word = words_ptr + 4 * i + tl.arange(0, BLOCK)
    first = tl.arange(0, BLOCK) == 0
    tl.store(o_word, w0.to(tl.int32, bitcast=True), mask=first)
    tl.store(o_word + 1, w1.to(tl.int32, bitcast=True), mask=first)
    tl.store(o_word + 2, w2.to(tl.int32, bitcast=True), mask=first)
    tl.store(o_word + 3, w3.to(tl.int32, bitcast=True), mask=first)


@triton.jit
def uniforms_kernel(words_ptr, u_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(u_ptr + i, uniform_triton(tl.load(words_ptr + i).to(tl.uint32, bitcast=True)))


@triton.jit
def normals_kernel(seed_ptr, z_ptr, noise_id, stream, visit, q, PTX: tl.constexpr, BLOCK: tl.constexpr):
    j = tl.arange(0, BLOCK)
    radii, directions = polar4(tl.load(seed_ptr), j, noise_id, stream, visit, 1.0, PTX)
    for lane in tl.static_range(4):
        tl.store(z_ptr + lane * q + j, radii[lane] * directions[lane], mask=j < q)


def as_int32(words):
    """32-bit words as the int32 tensor with those bits."""
    return torch.from_numpy(np.array(words, dtype=np.uint32).view(np.int32))


def as_int64(seeds):
    return torch.from_numpy(np.array(seeds, dtype=np.uint64).view(np.int64))


def words_torch(counters, keys):
    """[N, 4] words from lists of counters and keys."""
    columns = torch.tensor(counters, dtype=torch.int64).unbind(1)
    return torch.stack(philox.philox_4x32(columns, tuple(torch.tensor(keys, dtype=torch.int64).unbind(1))), 1)


def words_triton(counters, keys, device):
    result = torch.zeros(len(counters), 4, dtype=torch.int32, device=device)
    seeds = as_int64([key[0] | key[1] << 32 for key in keys]).to(device)
    words_kernel[(len(counters),)](as_int32(counters).to(device), seeds, result, PTX=ptx(), BLOCK=16)
    return result.cpu().long() & MASK


def draw(seed=0, noise_id=0, stream=Stream.STEP, visit=0, n=DRAWS, dtype=torch.float32):
    """The noise of one sample: [n]."""
    return philox.normals(as_int64([seed]), torch.tensor([noise_id]), stream, n, visit, dtype)[0]


class TestWords:
    @pytest.mark.parametrize("case", KNOWN.values(), ids=KNOWN_IDS)
    def test_known_answers_of_the_judge(self, case):
        counter, key, answer = case
        assert philox_4x32_10(counter, key) == answer

    @pytest.mark.parametrize("case", KNOWN.values(), ids=KNOWN_IDS)
    def test_known_answers_in_torch(self, case):
        counter, key, answer = case
        assert tuple(words_torch([counter], [key])[0].tolist()) == answer

    @pytest.mark.parametrize("case", KNOWN.values(), ids=KNOWN_IDS)
    def test_known_answers_in_triton(self, case, kernel_device):
        counter, key, answer = case
        assert tuple(words_triton([counter], [key], kernel_device)[0].tolist()) == answer

    @settings(max_examples=100, deadline=None, derandomize=True, database=None)
    @given(st.tuples(WORDS, WORDS, WORDS, WORDS), st.tuples(WORDS, WORDS))
    def test_random_words_in_torch(self, counter, key):
        assert tuple(words_torch([counter], [key])[0].tolist()) == philox_4x32_10(counter, key)

    def test_random_words_in_triton(self, kernel_device):
        numbers = np.random.default_rng(1).integers(0, 1 << 32, (200, 6), dtype=np.uint64).tolist()
        counters, keys = [row[:4] for row in numbers], [row[4:] for row in numbers]
        expected = [philox_4x32_10(counter, key) for counter, key in zip(counters, keys, strict=True)]
        assert words_triton(counters, keys, kernel_device).tolist() == [list(words) for words in expected]


class TestUniform:
    def test_torch(self):
        u = philox.uniform(torch.tensor(EDGES))
        assert u.dtype == torch.float32
        assert u.tolist() == [uniform(word) for word in EDGES]

    def test_triton(self, kernel_device):
        padded = EDGES + [0] * (256 - len(EDGES))
        u = torch.zeros(256, device=kernel_device)
        uniforms_kernel[(1,)](as_int32(padded).to(kernel_device), u, BLOCK=256)
        assert u.tolist() == [uniform(word) for word in padded]

    def test_never_zero(self):
        assert philox.uniform(torch.tensor([0])).item() == 2.0**-33

    def test_one_for_the_top_128_words_alone(self):
        u = philox.uniform(torch.arange(MASK - 255, MASK + 1))
        assert (u == 1).tolist() == [False] * 128 + [True] * 128


class TestLayout:
    """The page in the docstring of philox.py, element by element."""

    @pytest.mark.parametrize("n", SIZES)
    def test_quarter(self, n):
        q = philox.quarter(n)
        assert q % 16 == 0
        assert 4 * q >= n > 4 * (q - 16)

    @pytest.mark.parametrize("n", SIZES)
    def test_float64(self, n):
        z = draw(12345678901234567890, 321, Stream.FORWARD, 2, n, torch.float64)
        # Only float64 rounding: of the angle, 2^-52 of 2 pi, times the radius.
        np.testing.assert_allclose(z.numpy(), noise(12345678901234567890, 321, 2, 2, n), rtol=0, atol=2e-14)

    @pytest.mark.parametrize("n", SIZES)
    def test_float32(self, n):
        z = draw(7, 999, Stream.STEP, 0, n)
        assert z.dtype == torch.float32
        np.testing.assert_allclose(z.numpy(), noise(7, 999, 1, 0, n), rtol=0, atol=NORMAL_ATOL)

    @pytest.mark.parametrize(("q", "block"), [(16, 16), (48, 64)])
    def test_lanes_in_triton(self, q, block, kernel_device):
        z = torch.full((4 * q,), float("nan"), device=kernel_device)
        normals_kernel[(1,)](as_int64([2**63 + 5]).to(kernel_device), z, 17, 1, 3, q, PTX=ptx(), BLOCK=block)
        np.testing.assert_allclose(z.cpu().numpy(), noise(2**63 + 5, 17, 1, 3, 4 * q), rtol=0, atol=NORMAL_ATOL)

    def test_streams_are_numbered(self):
        assert {stream.name: int(stream) for stream in Stream} == {
            "X_T": 0,
            "STEP": 1,
            "FORWARD": 2,
            "INPAINT": 3,
            "FORWARD_STEP": 4,
            "ACCEPT": 5,
        }

    @pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, 2**32 + 1, 2**63 - 1, 2**63, 2**64 - 1])
    def test_all_64_bits_of_the_seed(self, seed):
        np.testing.assert_allclose(draw(seed, n=20).numpy(), noise(seed, 0, 1, 0, 20), rtol=0, atol=NORMAL_ATOL)

    def test_negative_int64_is_a_bit_pattern(self):
        z = philox.normals(torch.tensor([-1]), torch.tensor([4]), Stream.STEP, 20)[0]
        np.testing.assert_allclose(z.numpy(), noise(2**64 - 1, 4, 1, 0, 20), rtol=0, atol=NORMAL_ATOL)

    def test_samples_do_not_depend_on_their_batch(self):
        seeds, ids, visits = as_int64([3, 4, 2**40]), torch.tensor([5, 5, 6]), torch.tensor([0, 2, 1])
        batch = philox.normals(seeds, ids, Stream.STEP, 65, visits)
        for i in range(3):
            alone = philox.normals(seeds[i : i + 1], ids[i : i + 1], Stream.STEP, 65, int(visits[i]))
            assert torch.equal(batch[i], alone[0])

    @pytest.mark.parametrize("n", [4 * philox._BLOCK - 64, 4 * philox._BLOCK, 4 * philox._BLOCK + 1])
    def test_working_in_parts_makes_no_difference(self, n, monkeypatch):
        whole = draw(9, n=n)
        monkeypatch.setattr(philox, "_BLOCK", 1 << 12)
        # The parts end elsewhere, so the vectorised and the plain sine may trade places: one unit in the last place.
        torch.testing.assert_close(draw(9, n=n), whole, rtol=0, atol=NORMAL_ATOL)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_largest_radius(self, dtype):
        words = tuple(torch.tensor([[word]]) for word in (0, 0, 0, 1 << 30))
        z = torch.empty(1, 4, 1, dtype=dtype)
        philox._box_muller(words, z)
        assert abs(LARGEST - 6.764) < 5e-4
        assert z[0, 0, 0].item() == pytest.approx(LARGEST, rel=1e-6)
        assert z[0, 3, 0].item() == pytest.approx(LARGEST, rel=1e-6)  # a quarter of a turn: sine 1

    def test_radius_of_u_1_is_0_and_no_nan(self):
        z = torch.empty(1, 4, 1)
        philox._box_muller(tuple(torch.tensor([[MASK]]) for _ in range(4)), z)
        assert z.flatten().tolist() == [0.0] * 4


def anomalies(z):
    """The statistical checks that the rows of z [rows, N] fail, as independent rows of standard normals.

    Each statistic is put in units of its standard deviation under the hypothesis, and fails beyond SIGMAS; the
    Kolmogorov-Smirnov test fails at the same probability, 6e-7.
    """
    z = z.double()
    rows, size = z.shape
    flat = z.flatten()
    total, square = flat.numel(), flat.square()
    scores = {
        "mean": flat.mean() * total**0.5,
        "variance": (square.mean() - 1) * (total / 2) ** 0.5,
        "skewness": (flat * square).mean() * (total / 15) ** 0.5,
        "kurtosis": (square.square().mean() - 3) * (total / 96) ** 0.5,
        "lag 1": (z[:, 1:] * z[:, :-1]).mean() * (rows * (size - 1)) ** 0.5,
        "lag 16": (z[:, 16:] * z[:, :-16]).mean() * (rows * (size - 16)) ** 0.5,
    }
    for cut in (3, 4):
        for side, beyond in (("above", flat > cut), ("below", flat < -cut)):
            expected = stats.norm.sf(cut) * total
            scores[f"{side} {cut} sigma"] = (beyond.sum() - expected) / expected**0.5
    if rows > 1:
        for name, moment in (("values", z), ("squares", (z.square() - 1) / 2**0.5)):
            scores[f"correlation of {name}"] = (moment @ moment.T / size**0.5).triu(1).abs().max()
    found = [name for name, score in scores.items() if not abs(float(score)) < SIGMAS]
    if stats.kstest(flat.numpy(), "norm").pvalue < 6e-7:
        found.append("Kolmogorov-Smirnov")
    return found


# Generators that are wrong in one way, and the check that must notice.
BROKEN = {
    "scaled by 1.01": (lambda z: z * 1.01, "variance"),
    "shifted by 0.01": (lambda z: z + 0.01, "mean"),
    "a lane reused": (lambda z: torch.stack([z[0], z[1], z[2], z[2]]), "correlation of values"),
    "a lane mirrored": (lambda z: torch.stack([z[0], z[1], z[2], -z[1]]), "correlation of values"),
    "a radius shared": (
        lambda z: torch.stack([z[0], z[1], z[2], z[2] * z[3].sign()]),
        "correlation of squares",
    ),
    "every counter twice": (lambda z: z[:, ::2].repeat_interleave(2, dim=1), "lag 1"),
    "tails cut at 3.9": (lambda z: z.clamp(-3.9, 3.9), "above 4 sigma"),
    "upper half scaled by 1.02": (lambda z: torch.where(z > 0, z * 1.02, z), "skewness"),
    "uniform": (lambda z: (torch.special.ndtr(z) - 0.5) * 12**0.5, "Kolmogorov-Smirnov"),
    "twelve uniforms added": (
        lambda z: sum(torch.special.ndtr(z).roll(k, 1) for k in range(0, 24, 2)) - 6,
        "kurtosis",
    ),
}


@pytest.fixture(scope="module")
def million():
    """The four lanes of one sample."""
    return draw(2024, 500).view(4, -1)


class TestStatistics:
    """Fixed seeds: these pass or fail for ever."""

    def test_a_million_draws(self, million):
        assert anomalies(million) == []

    def test_neighbouring_steps(self):
        ids = torch.arange(16)
        assert anomalies(philox.normals(as_int64([5] * 16), ids, Stream.STEP, DRAWS // 64)) == []

    def test_neighbouring_seeds(self):
        seeds = as_int64(list(range(2**32 - 8, 2**32 + 8)))
        assert anomalies(philox.normals(seeds, torch.full((16,), 3), Stream.STEP, DRAWS // 64)) == []

    def test_streams_and_visits(self):
        rows = [draw(1, 0, stream, visit, DRAWS // 48) for stream in Stream for visit in range(4)]
        assert anomalies(torch.stack(rows)) == []

    def test_one_element_of_many_samples(self):
        """What a pixel sees across 2^15 seeds: the counter never moves, only the key."""
        seeds = torch.arange(1 << 15)
        assert anomalies(philox.normals(seeds, torch.zeros_like(seeds), Stream.X_T, 3).T) == []

    def test_tails_beyond_5_sigma_are_inhabited(self):
        """5.7 10^-7 of the draws: 2.3 of 4 10^6 expected; over 9 would have probability 0.0001."""
        seeds = torch.arange(4)
        beyond = (philox.normals(seeds, torch.zeros_like(seeds), Stream.STEP, DRAWS).abs() > 5).sum()
        assert 1 <= int(beyond) <= 9

    @pytest.mark.parametrize(("break_it", "caught_by"), BROKEN.values(), ids=list(BROKEN))
    def test_the_checks_catch_a_broken_generator(self, break_it, caught_by, million):
        assert caught_by in anomalies(break_it(million))
