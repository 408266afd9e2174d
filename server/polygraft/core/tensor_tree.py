"""The tensors of primitives: all of them, and copies on another device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from typing import Any, TypeVar, cast

import torch

Part = TypeVar("Part")


def tensors_of(part: Any) -> Iterator[torch.Tensor]:
    """All tensors of a primitive, of a part of one, or of several."""
    if isinstance(part, torch.Tensor):
        yield part
    elif isinstance(part, tuple):
        for item in part:
            yield from tensors_of(item)
    elif isinstance(part, Mapping):
        for item in part.values():
            yield from tensors_of(item)
    elif hasattr(part, "__dataclass_fields__"):
        for item in fields(part):
            yield from tensors_of(getattr(part, item.name))


def shapes_of(part: Part) -> Part:
    """A primitive with its tensors' shapes alone."""
    return Copies(torch.device("meta")).of(part)


class Copies:
    """Copies of primitives with their tensors on a device; a tensor that several share is copied once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # By the first tensor's id, and with it, so that no other gets that id.
        self._copied: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def of(self, part: Part) -> Part:
        """The copy of a primitive, of a part of one, or of several."""
        whole: Any = part
        if isinstance(part, torch.Tensor):
            if id(part) not in self._copied:
                self._copied[id(part)] = part, part.to(self._device, copy=True)
            return cast("Part", self._copied[id(part)][1])
        if isinstance(whole, tuple):
            return cast("Part", tuple(map(self.of, whole)))
        if isinstance(whole, Mapping):
            return cast("Part", {name: self.of(item) for name, item in whole.items()})
        if not hasattr(part, "__dataclass_fields__"):
            return part
        copies = {item.name: self.of(getattr(whole, item.name)) for item in fields(whole)}
        return cast("Part", replace(whole, **copies))
