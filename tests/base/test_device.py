"""`--device` that torch doesn't have is one line with a remedy."""

from __future__ import annotations

import pytest
import torch

from polygraft.base.device import check_device
from polygraft.base.loader import load_base
from polygraft.errors import ConfigError


def refusal(name: str) -> str:
    with pytest.raises(ConfigError) as caught:
        check_device(name)
    assert caught.value.flag == "--device"
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["cpu", "cpu:0"])
def test_the_processor_has_one_name(name: str) -> None:
    assert check_device(name) == "cpu"


@pytest.mark.parametrize("name", ["foo", "cuda:x", "0", "cuda:-1"])
def test_what_is_no_device(name: str) -> None:
    assert f"{name!r} is no device; use cpu, cuda or cuda:N" in refusal(name)


@pytest.mark.parametrize("name", ["meta", "mps", "xpu"])
def test_devices_that_arent_served(name: str) -> None:
    assert f"{name} isn't served" in refusal(name)


def test_a_torch_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    assert "was built without CUDA; install a build with it, or use cpu" in refusal("cuda")


def test_a_machine_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert "torch finds no CUDA device" in refusal("cuda")


def test_a_gpu_that_isnt_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert check_device("cuda") == "cuda"
    assert check_device("cuda:1") == "cuda:1"
    assert "there is no cuda:9; this machine has cuda:0 to cuda:1" in refusal("cuda:9")


def test_it_is_known_before_the_model_is() -> None:
    with pytest.raises(ConfigError, match="--device"):
        load_base("no/such/model", device="foo")
