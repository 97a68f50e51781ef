"""The progress bar: what it shows, where, and that it never waits for the device."""

import io
import sys

import pytest
import torch

from ddpm_fast.engine.progress import ProgressBar

CPU = torch.device("cpu")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(monkeypatch, show, steps=(5,), finished=True, device=CPU, stream=None, **options):
    """What a bar of five steps writes on stderr."""
    stream = io.StringIO() if stream is None else stream
    monkeypatch.setattr(sys, "stderr", stream)
    bar = ProgressBar(5, device, show, **options)
    for count in steps:
        bar.advance(count)
    bar.close(finished)
    return stream.getvalue()


def test_label(monkeypatch):
    text = shown(monkeypatch, "drawing moons")
    assert "drawing moons: 100%" in text
    assert "5/5" in text


def test_true_shows_a_bar_without_label(monkeypatch):
    assert shown(monkeypatch, True).split("\r")[-1].startswith("100%")


def test_false_shows_nothing(monkeypatch):
    assert shown(monkeypatch, False) == shown(monkeypatch, False, stream=Terminal()) == ""


def test_none_shows_on_terminals_only(monkeypatch):
    assert shown(monkeypatch, None) == ""
    assert "5/5" in shown(monkeypatch, None, stream=Terminal())


@pytest.mark.parametrize("steps", [(), (1,), (2, 3)], ids=str)
def test_finished_fills_the_bar(monkeypatch, steps):
    assert "5/5" in shown(monkeypatch, True, steps).split("\r")[-1]


def test_unfinished_stays_where_it_was(monkeypatch):
    last = shown(monkeypatch, True, (2, 1), finished=False).split("\r")[-1]
    assert "3/5" in last
    assert "5/5" not in last


class FakeEvent:
    """A CUDA event that the device has passed once the test says so."""

    made: list["FakeEvent"]

    def __init__(self):
        self.passed = False
        FakeEvent.made.append(self)

    def record(self):
        pass

    def query(self):
        return self.passed


def test_on_cuda_a_step_counts_once_the_device_has_passed_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(FakeEvent, "made", [], raising=False)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    bar = ProgressBar(100, torch.device("cuda"), True, every=10)
    counts = []
    for step in range(1, 51):
        if step in (25, 41):  # the device has passed all but the newest event
            for event in FakeEvent.made[:-1]:
                event.passed = True
        bar.advance(1)
        counts.append(bar._bar.n)
    assert len(FakeEvent.made) == 5  # one in ten steps
    assert (counts[23], counts[24], counts[39], counts[40], counts[-1]) == (0, 10, 10, 30, 30)
    bar.close(True)
    assert bar._bar.n == 100


def test_on_cuda_a_hidden_bar_records_no_event(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(FakeEvent, "made", [], raising=False)
    assert shown(monkeypatch, False, (50,), device=torch.device("cuda")) == ""
    assert FakeEvent.made == []
