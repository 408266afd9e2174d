"""How a folder that AdapterHub's library saved is recognised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ADAPTERHUB_WEIGHTS = "adapter.safetensors"
ADAPTERHUB_PICKLE = "pytorch_adapter.bin"
HEAD_CONFIG = "head_config.json"
"""What the library saves beside an adapter unless it is told `with_head=False`."""
HAS_HEAD = (
    f"{HEAD_CONFIG} says that it brings a head of its own, which isn't served; save it with with_head=False, "
    "or remove that file and the head's weights if the head is the base's own"
)


def is_adapterhub(config: Mapping[str, Any]) -> bool:
    """Whether an `adapter_config.json` is AdapterHub's: methods in a block, and none of PEFT's names."""
    return "config" in config and "peft_type" not in config
