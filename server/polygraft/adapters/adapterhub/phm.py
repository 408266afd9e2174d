"""Compacter's layers (arXiv 2106.04647): weights that are sums of Kronecker products, multiplied out at load.

`y = x H + b` with `H = sum over n of rule[n] kron W[n]`; rule and W may each be a product of two factors,
and be one for all layers (adapters/methods/modeling.py, PHMLayer).
"""

from __future__ import annotations

import torch

from polygraft.adapters.adapterhub.options import Options
from polygraft.adapters.adapterhub.source import Source
from polygraft.adapters.files.problems import Problem

_TRAINING_ONLY = ("phm_c_init", "phm_init_range", "learn_phm", "hypercomplex_nonlinearity")
_KEYS = (
    "phm_dim", "phm_rank", "phm_bias", "shared_phm_rule", "factorized_phm_rule", "shared_W_phm",
    "factorized_phm_W",
)  # fmt: skip


def take_phm(source: Source, options: Options) -> PHM | None:
    """Take the options of hypercomplex layers; None without them. Raises OptionProblem."""
    options.ignore(*_TRAINING_ONLY)
    if options.flag("phm_layer"):
        return PHM(source, options)
    options.ignore(*_KEYS)
    return None


class PHM:
    """The hypercomplex layers of one adapter."""

    def __init__(self, source: Source, options: Options) -> None:
        self._source = source
        self._dim = options.take("phm_dim", int, 4)
        self._rank = options.take("phm_rank", int, 1)
        self._has_bias = options.flag("phm_bias", True)
        self._shared_rule = options.flag("shared_phm_rule", True)
        self._factorized_rule = options.flag("factorized_phm_rule")
        self._shared_w = options.flag("shared_W_phm")
        self._factorized_w = options.flag("factorized_phm_W", True)
        self._shared = source.layers.shared(f"shared_parameters.{source.name}.")
        self._taken: dict[str, torch.Tensor] = {}
        if self._dim < 1 or self._rank < 1:
            raise options.problem("phm_dim", self._dim, f"isn't valid with phm_rank {self._rank}")
        if self._shared_w and not self._factorized_w:
            raise options.problem("shared_W_phm", True, "goes with factorized_phm_W, as in the library")

    def linear(
        self, module: str, position: str, inputs: int, outputs: int, *, wide: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return weight [outputs, inputs] and bias [outputs] of one layer.

        Args:
            module: the layer's name.
            position: "down" or "up", which shared weights are named by.
            wide: return the weight in float32, since another is computed from it.

        Raises:
            Problem: a tensor is missing or invalid.
        """
        reader = self._source.reader
        if inputs % self._dim or outputs % self._dim:
            raise Problem(f"phm_dim {self._dim} doesn't divide {inputs} and {outputs}, the sizes of {module}")
        reader.need_room(0, inputs * outputs)
        rule = self._rule(module)
        w = self._w(module, position, inputs // self._dim, outputs // self._dim)
        bias = reader.take(f"{module}.b", (outputs,), wide=True) if self._has_bias else None
        product = torch.einsum("nab,npq->bqap", rule, w).reshape(outputs, inputs)
        return reader.keep(product, module, torch.float32 if wide else None), bias

    def _rule(self, module: str) -> torch.Tensor:
        n = self._dim
        prefix = self._shared if self._shared_rule else f"{module}."
        if self._factorized_rule:
            return self._product(f"{prefix}phm_rule", (n, n, 1), (n, 1, n))
        return self._take(f"{prefix}phm_rule", (n, n, n))

    def _w(self, module: str, position: str, inputs: int, outputs: int) -> torch.Tensor:
        n, rank = self._dim, self._rank
        name = f"{self._shared}W_{position}" if self._shared_w else f"{module}.W"
        if self._factorized_w:
            return self._product(name, (n, inputs, rank), (n, rank, outputs))
        return self._take(name, (n, inputs, outputs))

    def _product(self, name: str, left: tuple[int, int, int], right: tuple[int, int, int]) -> torch.Tensor:
        return self._take(f"{name}_left", left) @ self._take(f"{name}_right", right)

    def _take(self, name: str, shape: tuple[int, int, int]) -> torch.Tensor:
        """Take a tensor in float32, once however many layers share it."""
        if name not in self._taken:
            self._taken[name] = self._source.reader.take(name, shape, wide=True)
        tensor = self._taken[name]
        if tensor.shape != shape:
            raise Problem(f"tensor {name} has shape {list(tensor.shape)}, expected {list(shape)}")
        return tensor
