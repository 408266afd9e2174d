"""The limits that the server's settings put on each adapter, for both `adapters check` and the engine."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from polygraft.config import ServerConfig


@dataclass(frozen=True, slots=True)
class AdapterLimits:
    """What one adapter may take.

    Args:
        rank: largest rank of a module.
        virtual_tokens: most of them.
        compiled_bytes: of memory.
        dtype: what adapters are kept in; None keeps the file's (float16 becomes float32).
        seconds: of CPU time for compiling it.
    """

    rank: int = 256
    virtual_tokens: int = 1024
    compiled_bytes: int = 2**30
    dtype: torch.dtype | None = None
    seconds: float = 600.0


def adapter_limits(config: ServerConfig, base: torch.dtype) -> AdapterLimits:
    """The limits, and the type that adapters are kept in, for a base that computes in `base`."""
    # No coarser than the base's own products; on a float32 base, the file's own type.
    auto = torch.bfloat16 if base == torch.bfloat16 else None
    dtypes = {"auto": auto, "float32": torch.float32, "bfloat16": torch.bfloat16}
    return AdapterLimits(
        rank=config.max_adapter_rank,
        virtual_tokens=config.max_virtual_tokens,
        compiled_bytes=config.max_adapter_bytes,
        dtype=dtypes[config.adapter_dtype],
    )
