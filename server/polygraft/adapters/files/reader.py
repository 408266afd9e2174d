"""Fail-closed reading: everything in the folder is accounted for, or the load fails with all that isn't.

A kind's compiler takes what it understands from the configuration and the tensors; `problems` then holds
whatever was wrong, missing or left over.
"""

from __future__ import annotations

import reprlib
from typing import Any

import torch

from polygraft.adapters.files.folder import AdapterFolder
from polygraft.adapters.files.patterns import Matching
from polygraft.adapters.files.refusals import judge_option
from polygraft.base.identity import is_same_base
from polygraft.core.spec import BaseSpec
from polygraft.errors import AdapterInvalid
from polygraft.printable import Texts, printable

# Keys that say where an adapter comes from or how it was trained, never what it computes.
_PROVENANCE = {
    "peft_type", "auto_mapping", "base_model_name_or_path", "revision", "peft_version", "inference_mode",
    "task_type",
}  # fmt: skip
_CAUSAL_TASKS = (None, "CAUSAL_LM", "FEATURE_EXTRACTION")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


_SHORT = reprlib.Repr()
_SHORT.maxlevel = 4
_SHORT.maxdict = _SHORT.maxlist = 20
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 200
"""Reads no more of a value than it shows, since one may be a megabyte long or nested a thousand deep."""


MAX_ENTRIES = 2**15
"""Limit of a list or an object in the configuration."""


def stays_finite(tensor: torch.Tensor, scaling: float) -> bool:
    """Whether a scaling and a nonempty tensor times that scaling are finite in float32."""
    factor = torch.tensor(scaling, dtype=torch.float32).abs()
    return bool((factor * max(1.0, float(tensor.abs().max()))).isfinite())


def shown(value: object) -> str:
    """A configuration value for an error's text."""
    return printable(_SHORT.repr(value), 203)


class FolderReader:
    """One folder's configuration and tensors, with a record of what has been taken.

    Args:
        adapter_dtype: what tensors are kept in: float32, bfloat16, or None for the file's own.
        max_rank: largest rank of a module.
        max_bytes: most that computed weights may take.
    """

    def __init__(
        self, folder: AdapterFolder, adapter_dtype: torch.dtype | None, max_rank: int, max_bytes: int
    ) -> None:
        self.name = folder.name
        self.problems = Texts()
        self.warnings = Texts()
        self.saved: tuple[str, ...] = ()
        """What `modules_to_save` named."""
        self.ties = False
        """Whether what is trained of the embedding is the head's as well, where the base ties the two."""
        self.matching = Matching()
        """Matches the configuration's patterns."""
        self.choice: Any = None
        """Set by `targets.choose`: what the targeting options mean."""
        self._config = dict(folder.config)
        self._kind = self._config.get("peft_type")
        self._tensors = folder.take_tensors()
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        """Of all tensors in the file."""
        self._dtype = adapter_dtype
        self._max_rank = max_rank
        self._max_bytes = max_bytes
        self._computed_bytes = 0
        self.parameters = sum(tensor.numel() for tensor in self._tensors.values())
        if self._config.get("task_type") not in _CAUSAL_TASKS:
            task = shown(self._config["task_type"])
            self.problems.append(f"task_type {task} isn't causal language modelling")
        self._base_name = self.option("base_model_name_or_path", str, "")
        self.peft_version: str = self.option("peft_version", str, "")
        for key in _PROVENANCE:
            self._config.pop(key, None)

    def check_base_name(self, base: BaseSpec, trained_on: str = "") -> None:
        """Warn where the adapter names another base, since shapes that fit don't make it the same one.

        Args:
            trained_on: what it names, where that isn't in PEFT's option.
        """
        trained_on = trained_on or self._base_name
        if trained_on and base.name and not is_same_base(trained_on, base.name, base.folder):
            self.warnings.append(
                f"it was trained on {trained_on!r}, and the base is {base.name!r}: if they are the same "
                "model, put the base's name into base_model_name_or_path"
            )

    def option(self, key: str, expected: type | tuple[type, ...], default: Any) -> Any:
        """Take a configuration value; one of the wrong type is a problem, and the default serves on."""
        value = self._config.pop(key, None)
        if value is None:
            return default
        types = expected if isinstance(expected, tuple) else (expected,)
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            self.problems.append(f"{key} has the wrong type: {shown(value)}")
            return default
        if isinstance(value, list | dict) and len(value) > MAX_ENTRIES:
            self.problems.append(f"{key} has {len(value)} entries, the limit is {MAX_ENTRIES}")
            return default
        return value

    def ignore(self, *keys: str) -> None:
        """Pass over configuration that has no effect on what the adapter computes once it is trained."""
        for key in keys:
            self._config.pop(key, None)

    def names(self) -> list[str]:
        """Names of the tensors that haven't been taken."""
        return list(self._tensors)

    def holds(self, name: str) -> bool:
        """Whether there is such a tensor that hasn't been taken."""
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...] | None:
        """A tensor's shape; None if there is none of that name, or it has been taken."""
        tensor = self._tensors.get(name)
        return None if tensor is None else tuple(tensor.shape)

    def take(self, name: str, shape: tuple[int | None, ...], *, wide: bool = False) -> torch.Tensor | None:
        """Take a tensor, in the type that adapters are kept in; None after noting what is wrong.

        Args:
            shape: None fits any size.
            wide: in float32 whatever adapters are kept in, to compute others from it (`keep`).
        """
        tensor = self._tensors.pop(name, None)
        if tensor is None:
            self.problems.append(f"tensor {name} is missing")
            return None
        if tensor.dtype not in _FLOATS:
            self.problems.append(
                f"tensor {name} has type {tensor.dtype}, not a floating-point one of 16 or 32 bits"
            )
            return None
        if not self._has_shape(name, tensor, shape):
            return None
        # float16 holds no value that float32 can't, and neither the base nor the operators compute in it.
        dtype = self._dtype or (torch.float32 if tensor.dtype == torch.float16 else tensor.dtype)
        tensor = tensor.to(torch.float32 if wide else dtype)
        if not torch.isfinite(tensor).all():
            self.problems.append(f"tensor {name} holds NaN or infinity")
            return None
        return tensor

    def take_indices(
        self, name: str, shape: tuple[int | None, ...], below: int, *, distinct: bool = False
    ) -> torch.Tensor | None:
        """Take a tensor of indices in [0, below) as int64; None after noting what is wrong.

        Args:
            distinct: no index may stand twice in the last dimension.
        """
        tensor = self._tensors.pop(name, None)
        if tensor is None:
            self.problems.append(f"tensor {name} is missing")
            return None
        if tensor.dtype not in _INTEGERS:
            self.problems.append(f"tensor {name} has type {tensor.dtype}, not one of whole numbers")
            return None
        if not self._has_shape(name, tensor, shape):
            return None
        indices = tensor.long()
        if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < below:
            self.problems.append(f"tensor {name} holds an index that isn't in [0, {below})")
            return None
        if distinct and bool((indices.sort(-1).values.diff(dim=-1) == 0).any()):
            self.problems.append(f"tensor {name} holds an index twice")
            return None
        return indices

    def _has_shape(self, name: str, tensor: torch.Tensor, shape: tuple[int | None, ...]) -> bool:
        """Whether a tensor has a shape; notes the other one."""
        fits = len(shape) == tensor.dim() and all(
            want is None or want == have for want, have in zip(shape, tensor.shape, strict=True)
        )
        if not fits:
            wanted = ", ".join("any" if want is None else str(want) for want in shape)
            self.problems.append(f"tensor {name} has shape {list(tensor.shape)}, expected [{wanted}]")
        return fits

    def keep(
        self, tensor: torch.Tensor, what: str, dtype: torch.dtype | None = None, *, scaling: float = 1.0
    ) -> torch.Tensor | None:
        """A tensor that was computed in float32 from others, in the type that adapters are kept in.

        That is never the file's own, which may be too narrow for it. None after noting that it isn't finite.

        Args:
            dtype: another type to keep it in.
            scaling: applied later in float32; the product must be finite too.
        """
        kept = tensor.to(dtype or self._dtype or torch.float32).contiguous()
        if not torch.isfinite(kept).all() or not stays_finite(kept, scaling):
            self.problems.append(f"the arithmetic makes weights of {what} infinite")
            return None
        return kept

    def has_room(self, rank: int, elements: int, dtype: torch.dtype | None = None) -> bool:
        """Whether so many more elements may be computed, for a module of this rank; notes the first excess.

        Kinds whose weights become larger than their file ask before they compute: a small file must not fill
        the memory until the limits are checked.

        Args:
            dtype: what they will be kept in, if not what adapters are.
        """
        self._computed_bytes += elements * (dtype or self._dtype or torch.float32).itemsize
        problem = None
        if rank > self._max_rank:
            problem = f"rank {rank} is over the limit of {self._max_rank} (--max-adapter-rank)"
        elif self._computed_bytes > self._max_bytes:
            problem = f"compiled it is over the limit of {self._max_bytes} bytes (--max-adapter-bytes)"
        if problem is not None and problem not in self.problems:
            self.problems.append(problem)
        return problem is None

    def finish(self) -> None:
        """Raise AdapterInvalid if anything was wrong or is left over."""
        for key, value in sorted(self._config.items()):
            if value not in (None, False, [], {}, ""):
                refused, why = judge_option(self._kind, key)
                if refused:
                    because = f": {why}" if why else ""
                    self.problems.append(f"{key[:200]}={shown(value)} isn't served{because}")
                else:
                    self.warnings.append(
                        f"{key[:200]}={shown(value)} is ignored: PEFT knows no such option of this kind"
                    )
        self.problems += [f"tensor {name} isn't expected" for name in sorted(self._tensors)]
        if self.problems:
            raise AdapterInvalid(self.name, self.problems)
