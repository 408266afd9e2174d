"""Bottleneck adapters (Pfeiffer et al., arXiv 2005.00247), as AdapterHub's library `adapters` 1.3 makes them.

That library pins an older transformers, so they are trained by our own code and saved in its format. Its
`SeqBnConfig` puts one behind each layer's MLP: with the residual stream r and the MLP's output h, the layer
gives r + h + A(r + h), where A(x) = up(relu(down(x))). The modules stand where the library's do, so that the
tensors get its names.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from recipe import BASE_MODEL
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter.safetensors"

SEQ_BN: dict[str, Any] = {
    "adapter_residual_before_ln": False,
    "cross_adapter": False,
    "dropout": 0.0,
    "factorized_phm_W": True,
    "factorized_phm_rule": False,
    "hypercomplex_nonlinearity": "glorot-uniform",
    "init_weights": "bert",
    "init_weights_seed": None,
    "inv_adapter": None,
    "inv_adapter_reduction_factor": None,
    "is_parallel": False,
    "learn_phm": True,
    "leave_out": [],
    "ln_after": False,
    "ln_before": False,
    "mh_adapter": False,
    "non_linearity": "relu",
    "original_ln_after": True,
    "original_ln_before": True,
    "output_adapter": True,
    "phm_bias": True,
    "phm_c_init": "normal",
    "phm_dim": 4,
    "phm_init_range": 0.0001,
    "phm_layer": False,
    "phm_rank": 1,
    "reduction_factor": 16,
    "residual_before_ln": True,
    "scaling": 1.0,
    "shared_W_phm": False,
    "shared_phm_rule": True,
    "stochastic_depth": 0.0,
    "use_gating": False,
}
"""What `adapters.SeqBnConfig().to_dict()` gives, without `architecture`, as the library saves it."""


class Bottleneck(nn.Module):
    """One layer's A, with the library's names and its initial weights."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.adapter_down = nn.Sequential(nn.Linear(hidden, width), nn.ReLU())
        self.adapter_up = nn.Linear(width, hidden)
        for linear in (self.adapter_down[0], self.adapter_up):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., hidden] to [..., hidden]."""
        return self.adapter_up(self.adapter_down(x))


class BottleneckModel(nn.Module):
    """A base with a bottleneck adapter behind each MLP; only the adapter is trained.

    Args:
        base: of the Llama shape; its layers are changed in place.
        name: of the adapter, part of its tensors' names.
        reduction_factor: hidden size over the bottleneck's width.
    """

    def __init__(self, base: PreTrainedModel, name: str, reduction_factor: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.name, self.reduction_factor = name, reduction_factor
        self._on = True
        hidden = base.config.hidden_size
        for layer in base.model.layers:
            layer.output_adapters = nn.Module()
            layer.output_adapters.adapters = nn.ModuleDict(
                {name: Bottleneck(hidden, hidden // reduction_factor)}
            )
            layer.register_forward_hook(self._add)

    def _add(self, layer: nn.Module, args: object, stream: torch.Tensor) -> torch.Tensor:
        return stream + layer.output_adapters.adapters[self.name](stream) if self._on else stream

    def forward(self, **inputs: Any) -> Any:
        """As the base's."""
        return self.base(**inputs)

    def generate(self, **inputs: Any) -> torch.Tensor:
        """As the base's."""
        return self.base.generate(**inputs)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """As PEFT's: for a while, the base alone."""
        self._on = False
        try:
            yield
        finally:
            self._on = True

    def tensors(self) -> dict[str, torch.Tensor]:
        """The adapter's, by the library's names."""
        found = self.base.state_dict()
        return {key: tensor for key, tensor in found.items() if f".adapters.{self.name}." in key}

    def config(self) -> dict[str, Any]:
        """What the library writes into `adapter_config.json`."""
        return {
            "config": {**SEQ_BN, "reduction_factor": self.reduction_factor},
            "hidden_size": self.base.config.hidden_size,
            "model_class": type(self.base).__name__,
            "model_name": BASE_MODEL,
            "model_type": self.base.config.model_type,
            "name": self.name,
            "version": "adapters.1.3.0",
        }


def load(base: PreTrainedModel, folder: Path) -> BottleneckModel:
    """Put a saved adapter of the form above into a base."""
    saved = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    factor = saved["config"]["reduction_factor"]
    assert saved["config"] == {**SEQ_BN, "reduction_factor": factor}
    model = BottleneckModel(base, saved["name"], factor)
    tensors = load_file(folder / WEIGHTS_FILE)
    assert tensors.keys() == model.tensors().keys()
    model.base.load_state_dict({key: tensor.float() for key, tensor in tensors.items()}, strict=False)
    return model.eval()
