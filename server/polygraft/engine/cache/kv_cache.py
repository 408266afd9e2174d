"""The paged cache's memory: one tensor of keys and one of values for each attention layer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from polygraft.core.spec import AttentionSite
from polygraft.errors import ConfigError
from polygraft.layers.attention import PagedAttention, attach
from polygraft.layers.native.kernels import Kernels
from polygraft.layers.step import StepContext


class KVCache:
    """Keys and values of all layers, in `num_blocks` blocks of `block_size` tokens.

    Args:
        budget: bytes.

    Raises:
        ConfigError: the budget is too small for one block, or can't be allocated.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Mapping[str, AttentionSite],
        step: StepContext,
        *,
        budget: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        kernels: Kernels | None,
    ) -> None:
        token_bytes = sum(s.kv_heads * (s.head_dim + s.value_dim) for s in sites.values()) * dtype.itemsize
        self.block_size = block_size
        self.num_blocks = budget // (token_bytes * block_size)
        if self.num_blocks < 1:
            raise ConfigError(
                "--kv-cache-bytes", f"{budget} bytes don't hold one block of {token_bytes * block_size} bytes"
            )
        self.bytes = self.num_blocks * token_bytes * block_size
        self._layers: list[tuple[torch.Tensor, torch.Tensor]] = []
        for index, (name, site) in enumerate(sites.items()):
            # Left as the system gives it: pages that no sequence reaches are never touched.
            try:
                keys = torch.empty(
                    self.num_blocks, site.kv_heads, site.head_dim, block_size, dtype=dtype, device=device
                )
                values = torch.empty(
                    self.num_blocks, site.kv_heads, block_size, site.value_dim, dtype=dtype, device=device
                )
            except RuntimeError as error:  # a limit that the plan doesn't know, such as ulimit -v
                raise ConfigError("--kv-cache-bytes", f"{self.bytes} bytes can't be had: {error}") from error
            self._layers.append((keys, values))
            attach(model, name, PagedAttention(site, keys, values, step, kernels, index))

    def write(self, layer: int, blocks: list[int], keys: torch.Tensor, values: torch.Tensor) -> None:
        """Put a prefix's keys and values [tokens, kv_heads, dim] into blocks, from the first slot on."""
        key_cache, value_cache = self._layers[layer]
        tokens = torch.arange(len(keys), device=key_cache.device)
        block = torch.tensor(blocks, device=key_cache.device)[tokens // self.block_size]
        offset = tokens % self.block_size
        key_cache[block, :, :, offset] = keys.to(key_cache)
        value_cache[block, :, offset] = values.to(value_cache)
