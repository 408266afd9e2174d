"""Checks that torch has the device of `--device`, before anything is loaded."""

from __future__ import annotations

import torch

from polygraft.errors import ConfigError

FLAG = "--device"


def check_device(name: str) -> str:
    """Return torch's name of the device.

    Raises:
        ConfigError: torch knows no such device, or this machine has none.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(FLAG, f"{name!r} is no device; use cpu, cuda or cuda:N") from None
    if device.type == "cpu":
        return "cpu"  # cpu:0 is another name for it
    if device.type != "cuda":
        raise ConfigError(FLAG, f"{device.type} isn't served; use cpu, cuda or cuda:N")
    if torch.version.cuda is None and torch.version.hip is None:
        raise ConfigError(
            FLAG, f"torch {torch.__version__} was built without CUDA; install a build with it, or use cpu"
        )
    count = torch.cuda.device_count()
    if count == 0:
        raise ConfigError(
            FLAG,
            "torch finds no CUDA device; check nvidia-smi and CUDA_VISIBLE_DEVICES, or use cpu",
        )
    if device.index is not None and device.index >= count:
        last = "cuda:0 alone" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        raise ConfigError(FLAG, f"there is no {name}; this machine has {last}")
    return str(device)
