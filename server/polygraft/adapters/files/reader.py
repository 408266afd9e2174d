"""Fail-closed reading: everything in the folder is accounted for, or the load fails with all that isn't.

A kind takes what it understands from the configuration and the tensors. A tensor that is missing or wrong is
raised as a `Problem`; `noting` turns those of each module into the list of all that is wrong.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from polygraft.adapters.files.folder import AdapterFolder
from polygraft.adapters.files.patterns import Matching
from polygraft.adapters.files.problems import OptionProblem, Problem, all_of
from polygraft.adapters.files.refusals import judge_option
from polygraft.adapters.files.shown import shown
from polygraft.base.identity import is_same_base
from polygraft.core.spec import BaseSpec
from polygraft.errors import AdapterInvalid
from polygraft.printable import Texts

# Keys that say where an adapter comes from or how it was trained, but change nothing that it computes.
_PROVENANCE = {
    "peft_type", "auto_mapping", "base_model_name_or_path", "revision", "peft_version", "inference_mode",
    "task_type",
}  # fmt: skip
_CAUSAL_TASKS = (None, "CAUSAL_LM", "FEATURE_EXTRACTION")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


MAX_ENTRIES = 2**15
"""Limit of a list or an object in the configuration."""


def stays_finite(tensor: torch.Tensor, scaling: float) -> bool:
    """Whether a scaling and a nonempty tensor times that scaling are finite in float32."""
    factor = torch.tensor(scaling, dtype=torch.float32).abs()
    return bool((factor * max(1.0, float(tensor.abs().max()))).isfinite())


Shape = tuple[int | None, ...]
"""Of a tensor; None fits any size."""


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
        self._tensors = folder.take_tensors()
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        """Of all tensors in the file."""
        self._dtype = adapter_dtype
        self._max_rank = max_rank
        self._max_bytes = max_bytes
        self._computed_bytes = 0
        self._given_up: dict[str, bool] = {}
        """Prefixes of tensors that nobody took because of another problem, and whether that was `inner`."""
        self._prefix = ""
        self._asked: set[str] = set()
        """What followed the prefix in the names of tensors that were asked for."""
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

    @contextmanager
    def noting(self, prefix: str | None = None, *, inner: bool = False) -> Iterator[None]:
        """Note a problem that is raised, rather than let it through.

        Tensors that nobody takes because of it aren't problems themselves: after an `OptionProblem` all of
        them, else those with the prefix.

        Args:
            inner: it is about one module of several. It lets an `OptionProblem` through, and only tensors
                that other modules have too may be left over.
        """
        around, self._prefix = self._prefix, prefix or ""
        try:
            yield
        except Problem as problem:
            is_option = isinstance(problem, OptionProblem)
            if is_option and inner:
                raise
            if is_option or prefix is not None:
                self._given_up["" if is_option else prefix or ""] = inner
            self.problems += [text for text in problem.texts if text not in self.problems]
        finally:
            self._prefix = around

    def take(self, name: str, shape: Shape, *, wide: bool = False) -> torch.Tensor:
        """Take a tensor, in the type that adapters are kept in.

        Args:
            wide: in float32 whatever adapters are kept in, to compute others from it (`keep`).

        Raises:
            Problem: it is missing, or has another shape or type, or isn't finite.
        """
        tensor = self._pop(name)
        if tensor.dtype not in _FLOATS:
            raise Problem(f"tensor {name} has type {tensor.dtype}, not a floating-point one of 16 or 32 bits")
        _check_shape(name, tensor, shape)
        # float16 holds no value that float32 can't, and neither the base nor the operators compute in it.
        dtype = self._dtype or (torch.float32 if tensor.dtype == torch.float16 else tensor.dtype)
        tensor = tensor.to(torch.float32 if wide else dtype)
        if not torch.isfinite(tensor).all():
            raise Problem(f"tensor {name} holds NaN or infinity")
        return tensor

    def take_all(self, tensors: Sequence[tuple[str, Shape]], *, wide: bool = False) -> list[torch.Tensor]:
        """Take several tensors. Raises Problem with what is wrong with each of them."""
        return all_of(*(partial(self.take, name, shape, wide=wide) for name, shape in tensors))

    def take_indices(self, name: str, shape: Shape, below: int, *, distinct: bool = False) -> torch.Tensor:
        """Take a tensor of indices in [0, below) as int64.

        Args:
            distinct: no index may stand twice in the last dimension.

        Raises:
            Problem: it is missing, or has another shape or type, or other indices.
        """
        tensor = self._pop(name)
        if tensor.dtype not in _INTEGERS:
            raise Problem(f"tensor {name} has type {tensor.dtype}, not one of whole numbers")
        _check_shape(name, tensor, shape)
        indices = tensor.long()
        if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < below:
            raise Problem(f"tensor {name} holds an index that isn't in [0, {below})")
        if distinct and bool((indices.sort(-1).values.diff(dim=-1) == 0).any()):
            raise Problem(f"tensor {name} holds an index twice")
        return indices

    def keep(
        self, tensor: torch.Tensor, what: str, dtype: torch.dtype | None = None, *, scaling: float = 1.0
    ) -> torch.Tensor:
        """Return a tensor that was computed in float32 from others, in the type that adapters are kept in.

        That is never the file's own, which may be too narrow for it.

        Args:
            what: names it in an error.
            dtype: another type to keep it in.
            scaling: applied later in float32; the product must be finite too.

        Raises:
            Problem: it isn't finite.
        """
        kept = tensor.to(dtype or self._dtype or torch.float32).contiguous()
        if not torch.isfinite(kept).all() or not stays_finite(kept, scaling):
            raise Problem(f"the arithmetic makes weights of {what} infinite")
        return kept

    def need_room(self, rank: int, elements: int, dtype: torch.dtype | None = None) -> None:
        """Ask to compute so many more elements, for a module of this rank.

        Kinds whose weights become larger than their file ask before they compute: a small file must not fill
        the memory until the limits are checked.

        Args:
            dtype: of the elements, if not the one that adapters are kept in.

        Raises:
            Problem: a limit would be exceeded.
        """
        self._computed_bytes += elements * (dtype or self._dtype or torch.float32).itemsize
        if rank > self._max_rank:
            raise Problem(f"rank {rank} is over the limit of {self._max_rank} (--max-adapter-rank)")
        if self._computed_bytes > self._max_bytes:
            raise Problem(f"compiled it is over the limit of {self._max_bytes} bytes (--max-adapter-bytes)")

    def _pop(self, name: str) -> torch.Tensor:
        """Take a tensor as it is. Raises Problem if it is missing."""
        self._asked.add(name.removeprefix(self._prefix))
        tensor = self._tensors.pop(name, None)
        if tensor is None:
            raise Problem(f"tensor {name} is missing")
        return tensor

    def _is_given_up(self, name: str) -> bool:
        """Whether another problem kept a tensor from being taken."""
        return any(
            name.startswith(prefix) and (not inner or name.removeprefix(prefix) in self._asked)
            for prefix, inner in self._given_up.items()
        )

    def finish(self, unserved: Collection[str] | None) -> None:
        """Raise AdapterInvalid if anything was wrong or is left over.

        Args:
            unserved: options that aren't ignored although nobody took them; None for all of them.
        """
        for key, value in sorted(self._config.items()):
            if value not in (None, False, [], {}, ""):
                refused, why = judge_option(unserved, key)
                if refused:
                    because = f": {why}" if why else ""
                    self.problems.append(f"{key[:200]}={shown(value)} isn't served{because}")
                else:
                    self.warnings.append(
                        f"{key[:200]}={shown(value)} is ignored: PEFT knows no such option of this kind"
                    )
        left = (name for name in sorted(self._tensors) if not self._is_given_up(name))
        self.problems += [f"tensor {name} isn't expected" for name in left]
        if self.problems:
            raise AdapterInvalid(self.name, self.problems)


def _check_shape(name: str, tensor: torch.Tensor, shape: Shape) -> None:
    """Raise Problem if a tensor has another shape."""
    fits = len(shape) == tensor.dim() and all(
        want is None or want == have for want, have in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise Problem(f"tensor {name} has shape {list(tensor.shape)}, expected [{wanted}]")
