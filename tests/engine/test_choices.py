"""Choices on disk: found again, never trusted where damaged, forgotten when asked."""

import logging
import multiprocessing

import pytest
import torch

from ddpm_fast import cli
from ddpm_fast.engine import choices
from ddpm_fast.sample import Sampler
from tests.support.unets import random_unet

KEY = ("network", (1, 3, 8, 8), torch.float32)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("DDPM_FAST_CACHE", raising=False)
    return tmp_path / "ddpm_fast"


def test_a_choice_is_found_again(cache):
    assert choices.recall("windows", KEY) is None
    choices.remember("windows", KEY, {0: 2, 100: 8}, "of a test")
    assert choices.recall("windows", KEY) == {"0": 2, "100": 8}
    assert choices.recall("format", KEY) is None
    assert choices.recall("windows", (*KEY, "another")) is None
    assert [path.parent for path in choices.remembered()] == [cache]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"about": 1}', "\xff"])
def test_a_damaged_file_counts_as_none(content, caplog):
    choices.remember("windows", KEY, 4, "of a test")
    (path,) = choices.remembered()
    path.write_bytes(content.encode("latin-1"))
    with caplog.at_level(logging.WARNING, "ddpm_fast"):
        assert choices.recall("windows", KEY) is None
    assert f"{path} is not readable and is measured anew" in caplog.text
    choices.remember("windows", KEY, 8, "of a test")
    assert choices.recall("windows", KEY) == 8


def test_nothing_is_remembered_where_it_is_off(cache, monkeypatch, capsys):
    monkeypatch.setenv("DDPM_FAST_CACHE", "off")
    choices.remember("windows", KEY, 4, "of a test")
    assert choices.recall("windows", KEY) is None
    assert not cache.exists()
    cli.main(["info"])
    assert "not remembered (DDPM_FAST_CACHE)" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_is_no_error(cache, caplog):
    cache.parent.mkdir(exist_ok=True)
    cache.write_text("a file")
    with caplog.at_level(logging.INFO, "ddpm_fast"):
        choices.remember("windows", KEY, 4, "of a test")
    assert "the choice is not remembered" in caplog.text
    assert choices.recall("windows", KEY) is None
    assert choices.forget() == 0


def _write(number):
    for _ in range(20):
        choices.remember("windows", KEY, number, "of a process")


def test_processes_may_write_the_same_choice():
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        pool.map(_write, range(3))
    assert choices.recall("windows", KEY) in (0, 1, 2)
    assert len(choices.remembered()) == 1


def test_the_command_shows_and_forgets(cache, capsys):
    choices.remember("windows", KEY, 4, "of a test")
    cli.main(["info"])
    assert f"1 remembered in {cache}" in capsys.readouterr().out
    assert cli.main(["info", "--forget"]) == 0
    assert "1 choices forgotten" in capsys.readouterr().out
    assert choices.remembered() == []


def test_weights_that_were_exchanged_are_another_network():
    network = random_unet()
    before = choices.fingerprint(network)
    assert choices.fingerprint(random_unet()) == before
    with torch.no_grad():
        weight = network.leave[-1].weight
        weight[:, [0, 1]] = weight[:, [1, 0]]
    assert choices.fingerprint(network) != before


def test_the_trial_of_memory_formats_is_remembered(monkeypatch):
    options = {"num_train_timesteps": 20, "memory_format": "auto", "optimize": None}
    first = Sampler(random_unet().eval(), (1, 1, 8, 8), **options).loop.network.memory_format
    monkeypatch.setattr("ddpm_fast.engine.network.seconds", lambda *_: pytest.fail("tried again"))
    assert Sampler(random_unet().eval(), (1, 1, 8, 8), **options).loop.network.memory_format == first
    with pytest.raises(BaseException, match="tried again"):
        Sampler(random_unet().eval(), (2, 1, 8, 8), **options)
