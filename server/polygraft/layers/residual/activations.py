"""Activations of bottleneck adapters, by transformers' names (transformers/activations.py, ACT2FN)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch.nn import functional as F  # noqa: N812 - its usual name
from transformers.activations import ACT2FN

Activation = Callable[[torch.Tensor], torch.Tensor]

ACTIVATIONS: Mapping[str, Activation] = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leaky_relu": F.leaky_relu,
    "linear": lambda x: x,
    "relu2": lambda x: F.relu(x).square(),
    "relu6": F.relu6,
    "mish": F.mish,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "laplace": ACT2FN["laplace"],
    "gelu_10": ACT2FN["gelu_10"],
}
"""In the order of native/bottleneck.h's `Activation`."""
