"""AdapterHub's names of activations (adapters/methods/modeling.py, Activation_Function_Class).

They are transformers' and its own "leakyrelu". PReLU has a slope that is learnt, so it is spelt out:
`prelu(x) = relu(x) - slope relu(-x)`, which makes a layer twice as wide and leaves relu.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from polygraft.adapters.adapterhub.options import Options
from polygraft.adapters.adapterhub.source import Source

PRELU = "prelu"
_SERVED: Mapping[str, str] = {
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    # All of these write out the same polynomial inside a tanh.
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_10": "gelu_10",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
    "leakyrelu": "leaky_relu",
    "leaky_relu": "leaky_relu",
    "linear": "linear",
    "relu2": "relu2",
    "relu6": "relu6",
    "mish": "mish",
    "quick_gelu": "quick_gelu",
    "laplace": "laplace",
    PRELU: PRELU,
}
# What version 1 called them (adapters/utils.py, ACTIVATION_RENAME).
_OLD: Mapping[str, str] = {"gelu": "gelu_new", "gelu_orig": "gelu"}


def take_non_linearity(source: Source, options: Options, default: str | None = None) -> str:
    """Take `non_linearity`: one of `layers.activations.ACTIVATIONS`, or `PRELU`. Raises OptionProblem."""
    given = options.take("non_linearity", str, default)
    if given is None:
        raise options.problem("non_linearity", None, "is missing")
    name = given.lower()
    served = _SERVED.get(_OLD.get(name, name) if source.old_activations else name)
    if served is None:
        raise options.problem("non_linearity", given, "is an activation that isn't served")
    return served


def take_slope(source: Source, *modules: str) -> float:
    """Take a PReLU's slope, saved with any of these modules. Raises Problem."""
    return float(source.take_any([f"{module}.f.weight" for module in modules], (1,), wide=True))


def without_prelu(
    down: torch.Tensor, down_bias: torch.Tensor | None, up: torch.Tensor, slope: float
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """The same function with relu for a PReLU: down [2 width, in], its bias, up [out, 2 width].

    Args:
        up: float32 [out, width].
    """
    return (
        torch.cat([down, -down]),
        None if down_bias is None else torch.cat([down_bias, -down_bias]),
        torch.cat([up, -slope * up], dim=1),
    )
