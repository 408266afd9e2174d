"""Compiles a folder of any kind into adapter weights, and checks them against the server's limits."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Generator
from typing import TypeVar

from polygraft.adapters.adapterhub.compile import KINDS as ADAPTERHUB_KINDS
from polygraft.adapters.adapterhub.compile import compile_adapterhub
from polygraft.adapters.files.adapterhub_form import is_adapterhub
from polygraft.adapters.files.diagnosis import diagnose_tensors
from polygraft.adapters.files.folder import AdapterFolder, untrusted
from polygraft.adapters.files.reader import FolderReader
from polygraft.adapters.files.refusals import why_not_kind
from polygraft.adapters.files.shown import shown
from polygraft.adapters.kind import Kind
from polygraft.adapters.kinds import KINDS
from polygraft.adapters.limits import AdapterLimits
from polygraft.adapters.peft.saved_modules import take_saved_modules
from polygraft.adapters.peft.targets import choose
from polygraft.core.adapter_weights import AdapterWeights
from polygraft.core.spec import BaseSpec
from polygraft.errors import AdapterInvalid

T = TypeVar("T")


def compile_adapter(
    folder: AdapterFolder, base: BaseSpec, limits: AdapterLimits
) -> Generator[None, None, AdapterWeights]:
    """Compile a folder of any kind, in slices: it yields where it may be interrupted.

    Raises:
        AdapterInvalid: with everything that is wrong; or compiling takes too long, or a library fails.
    """
    job = _compile(folder, base, limits)
    spent = 0.0
    while True:
        started = time.thread_time()
        try:
            with untrusted(folder.name, "its configuration or its weights"):
                next(job)
        except StopIteration as end:
            compiled: AdapterWeights = end.value
            return compiled
        spent += time.thread_time() - started
        if spent > limits.seconds:
            job.close()
            raise AdapterInvalid(folder.name, [f"compiling it takes more than {limits.seconds:g} s"])
        yield


def _compile(
    folder: AdapterFolder, base: BaseSpec, limits: AdapterLimits
) -> Generator[None, None, AdapterWeights]:
    reader = FolderReader(folder, limits.dtype, limits.rank, limits.compiled_bytes)
    try:
        compiled = yield from _compile_read(folder, reader, base, limits)
    except AdapterInvalid as error:
        # A single damaged tensor among others needs no diagnosis.
        worth_it = error.total > 1 or len(reader.shapes) == 1
        why = diagnose_tensors(reader.shapes, folder.config, base) if worth_it else None
        if why is None:
            raise
        raise error.because(why) from None
    return compiled


def _compile_read(
    folder: AdapterFolder, reader: FolderReader, base: BaseSpec, limits: AdapterLimits
) -> Generator[None, None, AdapterWeights]:
    if is_adapterhub(folder.config):
        reader.check_base_name(base)
        compiled = yield from compile_adapterhub(reader, base)
        unserved = None
    else:
        kind = _kind(folder)
        reader.check_base_name(base)
        compiled = yield from _compile_peft(kind, reader, base)
        unserved = kind.unserved
    _check_limits(reader, compiled, limits)
    reader.finish(unserved)
    return dataclasses.replace(compiled, warnings=reader.warnings.told())


def _compile_peft(
    kind: type[Kind], reader: FolderReader, base: BaseSpec
) -> Generator[None, None, AdapterWeights]:
    """Compile a folder of PEFT's, with the whole modules that it holds."""
    saved = take_saved_modules(reader, base, kind)
    if kind.targets_modules:
        yield from choose(reader, saved.base)
    compiled = yield from kind(reader, saved.base).compile()
    compiled = saved.added_to(compiled, base.vocabulary_size)
    _check_replaced(reader, compiled)
    return compiled


def _check_limits(reader: FolderReader, compiled: AdapterWeights, limits: AdapterLimits) -> None:
    """Note the limits that the adapter exceeds."""
    found = {
        f"rank {compiled.rank} is over the limit of {limits.rank} (--max-adapter-rank)": (
            compiled.rank > limits.rank
        ),
        f"{compiled.virtual_tokens} virtual tokens are over the limit of {limits.virtual_tokens} "
        "(--max-virtual-tokens)": compiled.virtual_tokens > limits.virtual_tokens,
        f"{compiled.compiled_bytes} bytes are over the limit of {limits.compiled_bytes} "
        "(--max-adapter-bytes)": compiled.compiled_bytes > limits.compiled_bytes,
    }
    reader.problems += [problem for problem, exceeded in found.items() if exceeded]


def _check_replaced(reader: FolderReader, compiled: AdapterWeights) -> None:
    """Note where what is replaced of the base can't be served beside the rest."""
    if compiled.merged_only and compiled.unmergeable:
        reader.problems.append(
            f"{compiled.kind} is served merged only, and {compiled.unmergeable} can't be merged"
        )
    if compiled.invocation and (compiled.replaces or compiled.embedding):
        reader.problems.append(
            "alora_invocation_tokens with parts of the base that it replaces: these act from the start, and "
            "the rest doesn't"
        )


def _kind(folder: AdapterFolder) -> type[Kind]:
    """The folder's kind. Raises AdapterInvalid if it isn't served."""
    peft_type = folder.config.get("peft_type")
    kind = KINDS.get(peft_type) if isinstance(peft_type, str) else None
    if kind is None:
        why = why_not_kind(peft_type)
        problem = f"peft_type {shown(peft_type)} isn't served{f': {why}' if why else ''}"
        served = f"served are {', '.join(sorted(KINDS))}, and AdapterHub's {', '.join(ADAPTERHUB_KINDS)}"
        raise AdapterInvalid(folder.name, [f"{problem}; {served}"])
    return kind


def run_to_end(job: Generator[None, None, T]) -> T:
    """Run a generator to its end, and return its result."""
    while True:
        try:
            next(job)
        except StopIteration as stop:
            result: T = stop.value
            return result
