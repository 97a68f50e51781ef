"""docs/walk.md: every picture is drawn by a function, every function draws a picture, every number has a file."""

import re

import pytest

pytest.importorskip("matplotlib")

import torch

from benchmarks.common.results import ROOT
from benchmarks.study import figures, run, tables
from ddpm_fast.data import moons

DOCS = ROOT / "docs"


def test_the_page_shows_every_figure():
    shown = re.findall(r"\]\(figures/(\w+)\.png\)", (DOCS / "walk.md").read_text(encoding="utf-8"))
    assert sorted(shown) == sorted(figures.FIGURES)
    assert sorted(path.stem for path in (DOCS / "figures").iterdir()) == sorted(figures.FIGURES)


def test_every_part_of_the_study_has_its_table_or_its_figure():
    assert set(tables.TABLES) == set(run.PARTS) - {"previews"}
    for part in run.PARTS:
        assert tables.rows_of(part), part


def test_the_forward_strip_is_drawn():
    figure = figures.forward()
    assert len(figure.axes) == 22
    figures.plt.close(figure)


def test_the_measures_tell_moons_from_blends():
    data = run.statistics_of(moons.batch(256, seed=0))
    good = run.measured(moons.batch(64, seed=1), data)
    blends = run.measured((moons.batch(64, seed=1) + moons.batch(64, seed=2)) / 2, data)
    assert good["misfit_median"] < 0.001
    assert good["lit_distance"] < 0.25
    assert blends["misfit_above_0.1"] > 0.9
    full, half = run.ends()
    found, _ = moons.measure(torch.stack([full, half]))
    assert found.lit.tolist() == pytest.approx([1.0, 0.5], abs=0.02)
