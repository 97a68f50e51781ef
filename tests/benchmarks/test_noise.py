"""The battery of benchmarks/noise/run.py: small sizes with fixed seeds, planted defects, and the committed run."""

import itertools
import json
import math

import pytest
import torch
from scipy import special

from benchmarks.common import pages
from benchmarks.noise import run as noise_battery
from benchmarks.noise import tails as noise_tails
from benchmarks.noise.generators import CLAMPED, OURS, PHILOX, PLANTED, Uniforms
from benchmarks.noise.p_values import LEVEL, anderson_darling_sf, p_count, row, tail_rows, verdict
from benchmarks.noise.statistics import BIG, FAMILIES, SMALL, Sizes, battery
from benchmarks.noise.tails import EXACT_CUTS, exact_tail, far_tails, lost_cells, radius_word
from ddpm_fast.kernels import philox
from ddpm_fast.kernels.philox import Stream
from tests.kernels.judges import uniform

# What a family needs to see the defect that was planted for it, where that is more than SMALL.
LARGER = {"moments": {"draws": 1 << 26}, "fit": {"fit": 1 << 22}}
TINY = Sizes(1 << 20, 1 << 20, 1 << 14, 1 << 20)  # one chunk
SEEN_IN_DRAWS = [bad for bad in PLANTED if bad.caught_by != "far tails"]
PUBLISHED = {1.933: 0.10, 2.492: 0.05, 3.857: 0.01}  # tables for any n; the limit at 1 % is 3.878
QUANTILES = {1.9329578327: 0.10, 2.4923671600: 0.05, 3.8781250216: 0.01}


class TestPValues:
    @pytest.mark.parametrize(("a2", "p"), PUBLISHED.items())
    def test_anderson_darling_at_the_published_critical_values(self, a2, p):
        assert anderson_darling_sf(a2) == pytest.approx(p, rel=0.03)

    @pytest.mark.parametrize(("a2", "p"), QUANTILES.items())
    def test_anderson_darling_at_its_limiting_quantiles(self, a2, p):
        assert anderson_darling_sf(a2) == pytest.approx(p, rel=1e-8)

    def test_anderson_darling_is_a_distribution(self):
        values = [anderson_darling_sf(0.01 * 1.03**k) for k in range(330)]
        assert values[0] == 1
        assert values[-1] < 1e-50
        assert all(a >= b for a, b in itertools.pairwise(values))
        # Where the series hands over to its largest term.
        assert anderson_darling_sf(20.0) == pytest.approx(anderson_darling_sf(20.0001), rel=0.02)

    def test_counts_are_judged_on_both_sides(self):
        assert p_count(100, 10**6, 1e-4) > 0.9
        assert p_count(60, 10**6, 1e-4) < 1e-4
        assert p_count(145, 10**6, 1e-4) < 1e-4

    def test_bonferroni(self):
        rows = [row("f", f"t{i}", 0, 0.5, 1) for i in range(9)]
        limit = LEVEL / 10
        for p, rejected in ((limit * 0.99, True), (limit * 1.01, False)):
            found = verdict([*rows, row("g", "last", 0, p, 1)])
            assert found["rejected"] is rejected
            assert found["caught_by"] == (["g"] if rejected else [])

    @pytest.mark.parametrize(("statistic", "p"), [(math.nan, math.nan), (math.nan, 1.0), (1.0, math.nan)])
    @pytest.mark.parametrize("place", [0, 1, 9])
    def test_nan_is_rejected_wherever_it_stands(self, statistic, p, place):
        rows = [row("f", f"t{i}", 0, 0.5, 1) for i in range(9)]
        rows.insert(place, row("g", "nan", statistic, p, 1))
        found = verdict(rows)
        assert found["rejected"] is True
        assert (found["smallest"], found["caught_by"]) == (0, ["g"])


class TestBattery:
    """Fixed seeds: these pass or fail for ever."""

    def test_the_noise_is_not_rejected(self):
        rows = battery(PHILOX, SMALL)
        found = verdict(rows)
        assert found["p_values"] > 60
        assert not found["rejected"], found

    @pytest.mark.parametrize("bad", SEEN_IN_DRAWS, ids=[bad.name for bad in SEEN_IN_DRAWS])
    def test_a_planted_defect_is_rejected(self, bad):
        # The tails at 4 and 5 are a part of the moments' pass.
        family = "moments" if bad.caught_by.startswith("tails") else bad.caught_by
        rows = FAMILIES[family](bad, SMALL._replace(**LARGER.get(bad.caught_by, {})))
        assert bad.caught_by in verdict(rows)["caught_by"]

    @pytest.mark.parametrize("family", FAMILIES)
    def test_one_nan_among_the_normals_is_rejected(self, family):
        drawn = []

        def draw(*arguments):
            z = philox.normals(*arguments)
            if not drawn:
                z[2, 7] = math.nan
            drawn.append(z)
            return z

        rows = FAMILIES[family](PHILOX._replace(draw=draw), TINY)
        assert sum(int(z.isnan().sum()) for z in drawn) == 1
        found = verdict(rows)
        assert found["rejected"] is True
        assert family in found["caught_by"]
        assert [line["test"] for line in rows if line["p"] != 0] == []
        json.dumps(noise_battery.strict(rows), allow_nan=False)

    @pytest.mark.parametrize("bad", PLANTED, ids=[bad.name for bad in PLANTED])
    def test_a_radius_of_0_leaves_no_nan(self, bad):
        counter, key = (torch.tensor([7378]), 21, int(Stream.STEP), 0), (11, 0)
        assert philox.uniform(philox.philox_4x32(counter, key)[2]) == 1
        z = bad.draw(torch.tensor([11]), torch.tensor([21]), Stream.STEP, 1 << 16)
        assert z.isfinite().all()

    def test_clamped_uniforms_have_no_6_sigma_and_10_10_draws_reject_that(self):
        assert exact_tail(6, CLAMPED)["count"] == 0
        rows = tail_rows("far tails", {"6": {"below": 0, "above": 0}}, 10**10)
        assert min(found["p"] for found in rows) < LEVEL / 100  # more p-values than a whole battery has


class TestExact:
    def test_6_sigma(self):
        found = exact_tail(6, OURS)
        assert found["radius_words"] == 65
        assert found["normal"] == pytest.approx(1.973e-9, rel=1e-3)
        assert found["ratio"] == pytest.approx(0.998775, abs=1e-6)
        # The angles of each radius as if they were continuous: their words are fine enough.
        radii = [math.sqrt(-2 * math.log(uniform(word))) for word in range(65)]
        assert found["probability"] == pytest.approx(
            sum(2 / math.pi * math.acos(6 / r) for r in radii) / 2**32, rel=1e-5
        )
        lost = lost_cells(6)
        assert 1 - sum(lost.values()) == pytest.approx(found["ratio"], abs=1e-4)

    @pytest.mark.parametrize(("cut", "ratio"), [(5, 0.999998), (5.5, 0.999959), (6.5, 0.987111), (6.764, 0)])
    def test_other_cuts(self, cut, ratio):
        assert exact_tail(cut, OURS)["ratio"] == pytest.approx(ratio, abs=1e-6)

    @pytest.mark.parametrize("cut", [1.5, 2.5, 3.3])
    @pytest.mark.parametrize("middle", [0.5, 0.3])
    def test_against_all_pairs_of_ten_bits(self, cut, middle):
        def as_uniform(word):
            return (word.float() + middle) / 1024

        ten = Uniforms(10, as_uniform, as_uniform)
        words = torch.arange(1024)
        radius, angle = ten.polar(words, words)
        z = torch.stack([torch.outer(radius, angle.cos()), torch.outer(radius, angle.sin())])
        found = exact_tail(cut, ten)
        assert found["count"] == int((z.abs() > cut).sum()) > 0
        assert found["of"] == z.numel()


class TestFarTails:
    def test_counts_are_those_of_the_normals(self, monkeypatch):
        monkeypatch.setattr(noise_tails, "FAR_CUTS", (3.0, 4.0))
        found = far_tails(OURS, 8 << 16, fast=False)
        assert found["draws"] == 8 << 16
        z = philox.normals(torch.zeros(8, dtype=torch.int64), torch.arange(8), Stream.STEP, 1 << 16, 0, torch.float64)
        for cut, sides in found["counts"].items():
            assert sides == {"below": int((z < -float(cut)).sum()), "above": int((z > float(cut)).sum())}
        assert found["counts"]["3"]["above"] > 500

    @pytest.mark.parametrize("uniforms", [OURS, CLAMPED], ids=["ours", "clamped"])
    def test_no_word_beyond_the_reach_passes_the_cut(self, uniforms):
        reach = uniforms.reach(5)
        radius, _ = uniforms.polar(torch.arange(reach + 1000), torch.zeros(reach + 1000))
        assert not (radius[reach:] > 5).any()
        assert (radius[: reach - 3] > 5).all()


@pytest.fixture(scope="module")
def committed():
    return noise_battery.committed()


class TestCommitted:
    """What results/noise__battery.json promises, and docs/noise.md repeats."""

    def test_it_is_strict_json(self):
        json.dumps(noise_battery.committed_file(), allow_nan=False)

    def test_draws(self, committed):
        tests = committed["ddpm_fast"]["tests"]
        near = [found for found in tests if found["family"] == "tails at 4 and 5"]
        far = {found["test"]: found for found in tests if found["family"] == "far tails"}
        assert {found["test"] for found in near} == {
            f"{side}{cut}" for side in ("z < -", "z > ", "|z| > ") for cut in (4, 5)
        }
        assert min(found["draws"] for found in near) >= 1e8
        assert min(far[test]["draws"] for test in ("z > 6", "z < -6", "|z| > 6")) >= 1e10

    def test_verdicts_follow_from_the_p_values(self, committed):
        for report in (committed["ddpm_fast"], committed["torch.randn"], *committed["planted"]):
            assert verdict(report["tests"]) == report["verdict"], report["name"]

    def test_p_values_follow_from_the_counts(self, committed):
        for report in (committed["ddpm_fast"], committed["torch.randn"], *committed["planted"]):
            for found in report["tests"]:
                if "count" in found:
                    sides = 2 if found["test"].startswith("|z|") else 1
                    probability = sides * float(special.ndtr(-abs(float(found["test"].split()[-1]))))
                    assert found["expected"] == pytest.approx(probability * found["draws"])
                    p = p_count(found["count"], found["draws"], probability)
                    assert found["p"] == pytest.approx(p, rel=1e-6), found

    def test_the_noise_stands_and_every_planted_defect_falls(self, committed):
        assert not committed["ddpm_fast"]["verdict"]["rejected"]
        assert [report["name"] for report in committed["planted"]] == [bad.name for bad in PLANTED]
        for report in committed["planted"]:
            assert report["verdict"]["rejected"], report["name"]
            assert report["planted_for"] in report["verdict"]["caught_by"]

    def test_exact_probabilities(self, committed):
        rows = {found["cut"]: found for found in committed["exact"]["ddpm_fast"]}
        assert set(rows) == set(EXACT_CUTS)
        for cut in (5, 6, 6.5):
            assert rows[cut]["count"] == exact_tail(cut, OURS)["count"]

    def test_the_page_is_in_step(self, committed):
        text = noise_battery.PAGE.read_text(encoding="utf-8")
        assert pages.filled(text, noise_battery.tables(committed), noise_battery.PAGE.name) == text


@pytest.mark.slow
class TestBig:
    def test_the_noise_is_not_rejected(self):
        rows = battery(PHILOX, BIG)
        far = far_tails(OURS, 10**10)
        found = verdict(rows + tail_rows("far tails", far["counts"], far["draws"]))
        assert not found["rejected"], found

    def test_compiled_and_plain_words_count_the_same(self):
        draws = 4 << 20
        assert far_tails(OURS, draws)["draws"] == draws
        words, block = noise_tails._fastest_radius_word()
        other = [torch.tensor([[value]]) for value in (999, 2**32 - 1, 1)]
        j = torch.arange(block)[None]
        assert torch.equal(words(j, *other), radius_word(j, *other))
