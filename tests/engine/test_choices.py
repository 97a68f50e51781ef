"""Choices on disk: found again, never trusted where damaged, forgotten when asked."""

import json
import logging
import multiprocessing

import pytest
import torch

from ddpm_fast import cli
from ddpm_fast.engine import choices
from ddpm_fast.engine.call import Call
from ddpm_fast.sample import Sampler
from tests.support.unets import random_unet

KEY = ("network", (1, 3, 8, 8), torch.float32)


def recall(kind, key, read=lambda choice: choice):
    return choices.recall(kind, key, read)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("DDPM_FAST_CACHE", raising=False)
    return tmp_path / "ddpm_fast"


def test_a_choice_is_found_again(cache):
    assert recall("windows", KEY) is None
    choices.remember("windows", KEY, {0: 2, 100: 8}, "of a test")
    assert recall("windows", KEY) == {"0": 2, "100": 8}
    assert recall("format", KEY) is None
    assert recall("windows", (*KEY, "another")) is None
    assert [path.parent for path in choices.remembered()] == [cache]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"about": 1}', "\xff", "[" * 10**5], ids=range(6))
def test_a_damaged_file_counts_as_none(content, caplog):
    choices.remember("windows", KEY, 4, "of a test")
    (path,) = choices.remembered()
    path.write_bytes(content.encode("latin-1"))
    with caplog.at_level(logging.WARNING, "ddpm_fast"):
        assert recall("windows", KEY) is None
    assert f"{path} is not readable and is measured anew" in caplog.text
    choices.remember("windows", KEY, 8, "of a test")
    assert recall("windows", KEY) == 8


def test_nothing_is_remembered_where_it_is_off(cache, monkeypatch, capsys):
    monkeypatch.setenv("DDPM_FAST_CACHE", "off")
    choices.remember("windows", KEY, 4, "of a test")
    assert recall("windows", KEY) is None
    assert not cache.exists()
    cli.main(["info"])
    assert "not remembered (DDPM_FAST_CACHE is off" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_is_no_error(cache, caplog):
    cache.parent.mkdir(exist_ok=True)
    cache.write_text("a file")
    with caplog.at_level(logging.INFO, "ddpm_fast"):
        choices.remember("windows", KEY, 4, "of a test")
    assert "the choice is not remembered" in caplog.text
    assert recall("windows", KEY) is None
    assert choices.forget() == 0


def _write(number):
    for _ in range(20):
        choices.remember("windows", KEY, number, "of a process")


def test_processes_may_write_the_same_choice():
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        pool.map(_write, range(3))
    assert recall("windows", KEY) in (0, 1, 2)
    assert len(choices.remembered()) == 1


def test_the_command_shows_and_forgets(cache, capsys):
    choices.remember("windows", KEY, 4, "of a test")
    cli.main(["info"])
    shown = capsys.readouterr().out
    assert f"1 remembered in {cache}" in shown
    assert "of a test: 4" in shown
    assert cli.main(["info", "--forget"]) == 0
    assert "1 choices forgotten" in capsys.readouterr().out
    assert choices.remembered() == []


@pytest.mark.parametrize("choice", [None, {}, {"0": -1}, {"0": 2.5}, {"1": 2}, "x", [1], True])
def test_a_plan_that_is_none_is_measured_anew(choice, caplog):
    options = {"num_train_timesteps": 20, "speculate": True}
    sampler = Sampler(random_unet().eval(), (1, 1, 8, 8), **options)
    (path,) = choices.remembered()
    whole = path.read_text()
    path.write_text(json.dumps({"about": "of a test", "choice": choice}))
    with caplog.at_level(logging.WARNING, "ddpm_fast"):
        again = Sampler(random_unet().eval(), (1, 1, 8, 8), **options)
    assert again.windows is not None
    assert [message for message in caplog.messages if "measured anew" in message] == [caplog.messages[0]]
    assert json.loads(path.read_text()).keys() == json.loads(whole).keys()
    assert json.loads(path.read_text())["choice"] == {str(t): width for t, width in again.windows.to_dict().items()}
    assert sampler.windows is not again.windows


def test_a_format_that_is_none_is_tried_anew(caplog):
    options = {"num_train_timesteps": 20, "memory_format": "auto", "optimize": None}
    Sampler(random_unet().eval(), (1, 1, 8, 8), **options)
    (path,) = choices.remembered()
    path.write_text('{"about": "of a test", "choice": "sideways"}')
    network = Sampler(random_unet().eval(), (1, 1, 8, 8), **options).loop.network
    assert "measured anew" in caplog.text
    assert json.loads(path.read_text())["choice"] == network.memory_format


def test_where_choices_lie(monkeypatch, tmp_path):
    assert choices.folder() == tmp_path / "ddpm_fast"
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    for ignored in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert choices.folder() == home / ".cache" / "ddpm_fast"

    def homeless(*_):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(choices.Path, "home", homeless)
    assert choices.folder() is None
    choices.remember("windows", KEY, 4, "of a test")
    assert recall("windows", KEY) is None


def test_a_network_that_cannot_be_read_is_not_remembered(caplog):
    network = torch.nn.Conv2d(1, 1, 3, padding=1, device="meta")
    call = Call.of(lambda x, t: x, (1, 1, 8, 8), device="cpu", module=network)
    with caplog.at_level(logging.INFO, "ddpm_fast"):
        assert choices.key_of(call) is None
    assert "are not remembered" in caplog.text
    assert choices.key_of(Call.of(lambda x, t: x, (1, 1, 8, 8))) is None
    choices.remember("windows", None, 4, "of a test")
    assert choices.remembered() == []


def test_networks_that_compute_otherwise_have_other_fingerprints():
    def made(activation=torch.nn.SiLU, dtype=torch.float32):
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(2, 2), activation()).to(dtype)

    prints = [choices.fingerprint(made(**each)) for each in ({}, {"activation": torch.nn.GELU}, {"dtype": torch.half})]
    assert len({*prints, choices.fingerprint(torch.nn.BatchNorm1d(2))}) == 4
    assert choices.fingerprint(made()) == prints[0]
    odd = torch.nn.ParameterList([torch.zeros(2, dtype=torch.complex64), torch.zeros(0), torch.full((2,), torch.nan)])
    assert choices.fingerprint(odd)


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
