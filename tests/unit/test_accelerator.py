"""Devices by name, and errors for devices that do not exist."""

import re

import pytest
import torch

from fedloom import accelerator
from fedloom.cli import main
from fedloom.config.settings import make_settings
from fedloom.errors import ConfigError

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")


def test_the_cpu_is_always_there():
    assert accelerator.place("cpu") == accelerator.ON_HOST
    assert accelerator.describe_device(accelerator.find("cpu")) == "cpu"
    x = torch.ones(3)
    assert accelerator.staged(x, accelerator.HOST) is x
    with accelerator.exact(accelerator.HOST, tf32=True):
        assert not torch.are_deterministic_algorithms_enabled()


@NO_GPU
@pytest.mark.parametrize("words", [["run"], ["compare", "method=fedavg,local"], ["bench", "w4-mlp", "scale=0.01"]])
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_missing_device_is_a_one_line_error(tmp_path, monkeypatch, capsys, words, device):
    monkeypatch.chdir(tmp_path)
    key = "device" if words[0] == "bench" else "engine.device"
    assert main([*words, f"{key}={device}"]) == 2
    err = capsys.readouterr().err
    assert f"engine.device={device}: torch finds no CUDA device here" in err
    assert "use engine.device=cpu" in err
    assert err.count("\n") == 1
    assert not list(tmp_path.rglob("config.toml"))


def test_a_gpu_beyond_the_last_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert accelerator.find("cuda") == torch.device("cuda:0")
    assert accelerator.find("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ConfigError, match=re.escape("engine.device=cuda:2: no such device; use cuda:0 to cuda:1")):
        accelerator.find("cuda:2")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"engine": {"device": "gpu"}}, "engine.device=gpu: must be cpu, cuda or cuda:N"),
        ({"engine": {"device": "cuda:-1"}}, "engine.device=cuda:-1: must be cpu, cuda or cuda:N"),
        ({"engine": {"device": "auto"}}, "engine.device=auto: must be cpu, cuda or cuda:N"),
        ({"engine": {"name": "processes", "device": "cuda"}}, "applies only to engine=sequential and vectorised"),
        (
            {"engine": {"name": "debug+ray", "device": "cuda"}},
            "applies only to engine=sequential and vectorised, not ray",
        ),
        ({"engine": {"device_bytes": 5}}, "engine.device_bytes=5: needs a GPU"),
        ({"engine": {"device": "cuda", "device_bytes": -1}}, "engine.device_bytes=-1: must be at least 0"),
        ({"engine": {"convolutions": "tuned"}}, "engine.convolutions=tuned: applies only to engine=vectorised"),
        ({"precision": "tf32"}, "precision=tf32: needs a GPU"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(values, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        make_settings(values)


def test_settings_that_can_be_meant_are_taken():
    for name in ("auto", "sequential", "vectorised", "debug", "bytes+vectorised"):
        made = make_settings({"engine": {"name": name, "device": "cuda:3"}, "precision": "tf32"})
        assert (made.engine.name, made.engine.device, made.precision) == (name, "cuda:3", "tf32")
    made = make_settings({"engine": {"name": "bytes+vectorised", "convolutions": "columns"}})
    assert made.engine.convolutions == "columns"


@pytest.mark.parametrize("tf32", [True, False])
def test_strict_arithmetic_restores_earlier_settings(tf32):
    def state():
        cudnn = torch.backends.cudnn
        return (
            torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
            (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32),
        )

    before = state()
    with accelerator.strict(tf32):
        products, deterministic, filled, cudnn = state()
    assert (products, deterministic, filled) == ("high" if tf32 else "highest", True, False)
    assert cudnn == (True, False, True, tf32)
    assert state() == before


def test_the_help_shows_the_settings(capsys):
    assert main(["run", "--help"]) == 0
    out = capsys.readouterr().out
    assert "engine.device= [cpu]" in out
    assert "engine.device_bytes=" in out
