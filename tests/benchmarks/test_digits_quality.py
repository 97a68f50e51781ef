"""The digits: the two halves of the data, the ruler, and the embedded model as the ruler measures it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

from benchmarks.common.results import FOLDER
from benchmarks.study import digits_quality
from benchmarks.study.digits_quality import Digits, Ruler, nearest, spread
from ddpm_fast import cli
from ddpm_fast.config import SamplerConfig
from ddpm_fast.data import digits
from ddpm_fast.models.checkpoint import EMBEDDED, Classes, load_checkpoint

RESULT = FOLDER / "digits__quality.json"


@pytest.fixture(scope="module")
def ruler():
    return Ruler()


def test_the_halves_share_no_image_and_every_class():
    from sklearn.datasets import load_digits

    seen, unseen = digits.halves()
    everything = torch.from_numpy(load_digits().images).flatten(1).float() / 8 - 1
    both = torch.cat([seen.images, unseen.images]).flatten(1)
    assert both.shape == everything.shape == (1797, 64)
    assert torch.equal(both.unique(dim=0), everything.unique(dim=0))
    assert len(both.unique(dim=0)) == 1797  # no two images are equal, so no image is in both halves
    assert (seen.labels.bincount() - unseen.labels.bincount()).abs().max() <= 1
    assert (both.min(), both.max()) == (-1, 1)
    again, _ = digits.halves()
    assert torch.equal(again.images, seen.images)


def test_training_sees_the_first_half_alone():
    data, (seen, _) = digits.training(), digits.halves()
    assert (len(data), data.shape, data.classes) == (899, (1, 8, 8), [str(number) for number in range(10)])
    pixels, labels = data(899, 0, 0)
    order = (pixels.flatten(1)[:, None] == seen.images.flatten(1)).all(2).int().argmax(1)
    assert sorted(order.tolist()) == list(range(899))
    assert torch.equal(seen.labels[order], labels)


def test_distances():
    images = torch.tensor([0.0, 0.0, 1.0, 3.0]).view(4, 1, 1, 1).expand(4, 1, 8, 8)
    assert nearest(images, images[2:]).tolist() == [1, 1, 0, 0]
    assert nearest(images, images, others=True).tolist() == [0, 0, 1, 2]
    distances = spread(Digits(images, torch.tensor([0, 0, 1, 1])))
    assert distances[:2].tolist() == pytest.approx([0, 2])
    assert distances[2:].isnan().all()


def test_the_ruler_on_the_data(ruler):
    row = ruler.data()
    assert row["accuracy"] > 0.98
    assert row["diversity"] == pytest.approx(1, abs=0.02)
    assert abs(row["nearer_to_seen"] - 0.5) < 4 * row["nearer_to_seen_error"]


def test_the_ruler_detects_copies_wrong_classes_and_averages(ruler):
    images, labels = ruler.seen
    generator = torch.Generator().manual_seed(0)
    repeated = ruler(Digits(images + 0.1 * torch.randn(images.shape, generator=generator), labels))
    assert repeated["nearer_to_seen"] > 0.99
    assert repeated["to_seen_median"] < 0.5 * repeated["to_unseen_median"]
    muddled = ruler(Digits(images, labels[torch.randperm(len(labels), generator=generator)]))
    assert muddled["accuracy"] < 0.2
    means = torch.stack([images[labels == k].mean(0) for k in range(10)])
    average = ruler(Digits(means[labels], labels))
    assert average["accuracy"] > 0.9
    assert average["diversity"] == 0


def test_the_embedded_model():
    found = load_checkpoint("digits")
    assert (found.shape, found.diffusion, found.classes) == (
        (1, 8, 8),
        SamplerConfig(),
        Classes("class_labels", 10, none=10),
    )
    assert found.about["data"] == digits.training().about
    assert sum(path.stat().st_size for path in EMBEDDED["digits"].iterdir()) < 3e6


def test_a_live_draw(ruler):
    found = digits_quality.draw_digits("digits", 60, 2.0, num_inference_steps=100, progress=False)
    row = ruler(found)
    assert row["accuracy"] >= 0.9
    assert 0.5 < row["diversity"] < 1.1
    assert row["to_seen_smallest"] > 0.05


def test_the_committed_measurement():
    rows = {(row["digits"], row["guidance"]): row for row in json.loads(RESULT.read_text())["rows"]}
    data = rows.pop(("data", None))
    assert {guidance for _, guidance in rows} == set(digits_quality.GUIDANCES)
    for (_, guidance), row in rows.items():
        assert row["count"] >= 500
        if guidance is not None and guidance > 1:
            assert row["accuracy"] >= 0.9
            assert min(row["accuracy_by_class"]) >= 0.8
            assert min(row["diversity_by_class"]) > 0.5
        assert row["to_seen_smallest"] > 0.5 * data["to_seen_smallest"]  # no copy
        assert row["nearer_to_seen"] < 0.75


def test_the_command_draws_digits(ruler, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--label", "0-9", "--guidance", "2", "--seeds", "0-9", "--steps", "50", "--quiet"]
    assert cli.main(["sample", "--model", "digits", "--out", "a.npz", *options]) == 0
    pixels = torch.from_numpy(np.load("a.npz")["arr_0"]).float().permute(0, 3, 1, 2) / 127.5 - 1
    assert ruler(Digits(pixels, torch.arange(10)))["accuracy"] >= 0.8


def test_training_on_digits_and_a_folder_of_that_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["--data", "digits", "--steps", "1", "--batch", "2", "--samples", "0", "--quiet"]
    assert cli.main(["train", "--out", "run", *options]) == 0
    assert load_checkpoint("run").about["data"]["count"] == 899
    assert cli.main(["train", "--out", "run2", "--flip", *options]) == 2
    assert "a mirrored digit is none" in capsys.readouterr().err
    Path("digits").mkdir()  # a folder that exists comes before the built-in data
    assert cli.main(["train", "--out", "run2", *options]) == 2
    assert "digits holds no picture" in capsys.readouterr().err
