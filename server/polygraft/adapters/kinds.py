"""The table of the kinds that are served: every `Kind` in a file of `adapters/peft/`."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Mapping

from polygraft.adapters import peft
from polygraft.adapters.kind import Kind


def find_kinds() -> Mapping[str, type[Kind]]:
    """Return the kinds by PEFT's name, LoRA first and the others by their title."""
    found: dict[str, type[Kind]] = {}
    for file in pkgutil.iter_modules(peft.__path__, f"{peft.__name__}."):
        module = importlib.import_module(file.name)
        for _, member in inspect.getmembers(module, inspect.isclass):
            if (
                issubclass(member, Kind)
                and member.__module__ == module.__name__
                and hasattr(member, "peft_type")
            ):
                found[member.peft_type] = member
    first = ("LORA", *sorted(found.keys() - {"LORA"}, key=lambda name: found[name].title.lower()))
    return {name: found[name] for name in first}


KINDS = find_kinds()
"""By `peft_type`."""
