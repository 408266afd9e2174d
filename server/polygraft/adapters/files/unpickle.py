"""The process that reads a pickle of weights and writes safetensors: `python -m` with this module's name.

torch's `weights_only` loader builds tensors and plain containers and runs nothing of the file's. It still
gets a process of its own: whatever a file does to the loader ends here, and its memory is bounded.
"""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from polygraft.adapters.files.folder import read_file
from polygraft.errors import AdapterInvalid

try:
    import resource
except ImportError:  # on Windows
    resource = None  # type: ignore[assignment]  # its absence is what is tested

_OVERHEAD = 2**28


def main(arguments: list[str]) -> int:
    """Convert one file, and print what came of it as one JSON object.

    Args:
        arguments: pickle, target, most bytes of either, and what becomes of names for one tensor: "copy"
            or "drop".

    Returns: the exit status.
    """
    source, target, limit, aliases = Path(arguments[0]), Path(arguments[1]), int(arguments[2]), arguments[3]
    _bound_memory(limit)
    try:
        tensors = read_tensors(source, limit, keep_aliases=aliases == "copy")
        save_file(tensors, target, metadata={"format": "pt"})
    except AdapterInvalid as error:
        return _answer(1, problems=error.problems)
    except (MemoryError, RuntimeError, OSError) as error:
        return _answer(1, problems=[f"{source.name} can't be converted: {_first_line(error)}"])
    return _answer(0, tensors=len(tensors))


def _answer(status: int, **what: Any) -> int:
    sys.stdout.write(json.dumps(what) + "\n")
    return status


def read_tensors(source: Path, limit: int, *, keep_aliases: bool) -> dict[str, torch.Tensor]:
    """The tensors of a pickled state dict, each with memory of its own.

    Args:
        limit: most bytes of the file, and of all tensors together.
        keep_aliases: whether a tensor that has several names is kept under each, or under the shortest.

    Raises:
        AdapterInvalid: it isn't a file of tensors by name, or is too large.
    """
    data = read_file(source.name, source, limit)
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, TypeError, LookupError) as error:
        raise AdapterInvalid(
            source.name, [f"{source.name} can't be read as tensors alone: {_first_line(error)}"]
        ) from None
    tensors = _checked(source.name, state)
    if not keep_aliases:
        tensors = _without_aliases(tensors)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if size > limit:
        problem = f"the tensors of {source.name} have {size} bytes, the limit is {limit}"
        raise AdapterInvalid(source.name, [problem])
    return {
        name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }


def _checked(name: str, state: Any) -> dict[str, torch.Tensor]:
    if not isinstance(state, dict) or not state:
        raise AdapterInvalid(name, [f"{name} holds a {type(state).__name__}, not tensors by name"])
    problems = [
        f"{name} holds a {type(value).__name__} under {str(key)[:200]!r}, not a tensor"
        for key, value in state.items()
        if not isinstance(key, str) or not isinstance(value, torch.Tensor) or value.layout != torch.strided
    ]
    if problems:
        raise AdapterInvalid(name, problems[:20])
    return state


def _without_aliases(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    kept: dict[tuple[Any, ...], str] = {}
    for name in sorted(tensors, key=lambda name: (len(name), name)):
        tensor = tensors[name]
        memory = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        kept.setdefault(memory if tensor.numel() else (name,), name)
    return {name: tensors[name] for name in sorted(kept.values())}


def _bound_memory(limit: int) -> None:
    """Let the process grow by what a file of `limit` bytes and its tensors can need, and no more."""
    if resource is None:
        return
    with contextlib.suppress(OSError, ValueError, IndexError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + 4 * limit + _OVERHEAD
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        if hard == resource.RLIM_INFINITY or most < hard:
            resource.setrlimit(resource.RLIMIT_AS, (most, hard))


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
