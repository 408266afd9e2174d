"""The kinds of adapter that are served, and how a folder of any of them is compiled.

A new kind is one file that reads its folder into primitives, and one line in `KINDS`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

from polygraft.adapters.adapterhub.compile import KINDS as ADAPTERHUB_KINDS
from polygraft.adapters.adapterhub.compile import compile_adapterhub
from polygraft.adapters.files.adapterhub_form import is_adapterhub
from polygraft.adapters.files.diagnosis import diagnose_tensors
from polygraft.adapters.files.folder import AdapterFolder, untrusted
from polygraft.adapters.files.reader import FolderReader, shown
from polygraft.adapters.files.refusals import why_not_kind
from polygraft.adapters.peft.adalora import compile_adalora
from polygraft.adapters.peft.beft import compile_beft
from polygraft.adapters.peft.boft import compile_boft
from polygraft.adapters.peft.c3a import compile_c3a
from polygraft.adapters.peft.cpt import compile_cpt
from polygraft.adapters.peft.deft import compile_deft
from polygraft.adapters.peft.delora import compile_delora
from polygraft.adapters.peft.fourierft import compile_fourierft
from polygraft.adapters.peft.frod import compile_frod
from polygraft.adapters.peft.glora import compile_glora
from polygraft.adapters.peft.gralora import compile_gralora
from polygraft.adapters.peft.hira import compile_hira
from polygraft.adapters.peft.hra import compile_hra
from polygraft.adapters.peft.ia3 import compile_ia3
from polygraft.adapters.peft.ln_tuning import compile_ln_tuning
from polygraft.adapters.peft.loha import compile_loha
from polygraft.adapters.peft.lokr import compile_lokr
from polygraft.adapters.peft.lora import compile_lora
from polygraft.adapters.peft.miss import compile_miss
from polygraft.adapters.peft.multitask_prompt_tuning import compile_multitask_prompt_tuning
from polygraft.adapters.peft.oft import compile_oft
from polygraft.adapters.peft.osf import compile_osf
from polygraft.adapters.peft.peanut import compile_peanut
from polygraft.adapters.peft.poly import compile_poly
from polygraft.adapters.peft.prefix_tuning import compile_cartridge, compile_prefix_tuning
from polygraft.adapters.peft.pvera import compile_pvera
from polygraft.adapters.peft.randlora import compile_randlora
from polygraft.adapters.peft.road import compile_road
from polygraft.adapters.peft.saved_modules import take_saved_modules
from polygraft.adapters.peft.shira import compile_shira
from polygraft.adapters.peft.soft_prompt import compile_p_tuning, compile_prompt_tuning
from polygraft.adapters.peft.supertuning import compile_supertuning
from polygraft.adapters.peft.targets import choose
from polygraft.adapters.peft.tinylora import compile_tinylora
from polygraft.adapters.peft.trainable_tokens import compile_trainable_tokens
from polygraft.adapters.peft.unilora import compile_unilora
from polygraft.adapters.peft.vblora import compile_vblora
from polygraft.adapters.peft.vera import compile_vera
from polygraft.adapters.peft.waveft import compile_waveft
from polygraft.core.adapter_weights import AdapterWeights
from polygraft.core.spec import BaseSpec
from polygraft.errors import AdapterInvalid

T = TypeVar("T")
Compiler = Callable[[FolderReader, BaseSpec], Generator[None, None, AdapterWeights]]

KINDS: Mapping[str, Compiler] = {
    "LORA": compile_lora,
    "IA3": compile_ia3,
    "ADALORA": compile_adalora,
    "LOHA": compile_loha,
    "LOKR": compile_lokr,
    "VERA": compile_vera,
    "OFT": compile_oft,
    "BOFT": compile_boft,
    "HRA": compile_hra,
    "DEFT": compile_deft,
    "PEANUT": compile_peanut,
    "PVERA": compile_pvera,
    "DELORA": compile_delora,
    "GRALORA": compile_gralora,
    "MISS": compile_miss,
    "UNILORA": compile_unilora,
    "VBLORA": compile_vblora,
    "POLY": compile_poly,
    "TINYLORA": compile_tinylora,
    "BEFT": compile_beft,
    "FOURIERFT": compile_fourierft,
    "C3A": compile_c3a,
    "SHIRA": compile_shira,
    "HIRA": compile_hira,
    "WAVEFT": compile_waveft,
    "RANDLORA": compile_randlora,
    "ROAD": compile_road,
    "SUPERTUNING": compile_supertuning,
    "OSF": compile_osf,
    "FROD": compile_frod,
    "GLORA": compile_glora,
    "TRAINABLE_TOKENS": compile_trainable_tokens,
    "LN_TUNING": compile_ln_tuning,
    "PREFIX_TUNING": compile_prefix_tuning,
    "CARTRIDGE": compile_cartridge,
    "PROMPT_TUNING": compile_prompt_tuning,
    "P_TUNING": compile_p_tuning,
    "MULTITASK_PROMPT_TUNING": compile_multitask_prompt_tuning,
    "CPT": compile_cpt,
}
_PROMPTS = {
    "PREFIX_TUNING", "CARTRIDGE", "PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CPT",
}  # fmt: skip
"""Kinds that leave the base's modules as they are: PEFT calls these by shorter names, and saves none."""


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
    compiler = _compiler(folder)
    reader.check_base_name(base)
    kind = folder.config.get("peft_type")
    if compiler is compile_adapterhub:
        compiled = yield from compiler(reader, base)
    else:
        saved = take_saved_modules(
            reader,
            base,
            "base_model." if kind in _PROMPTS else "base_model.model.",
            saves=kind not in _PROMPTS and kind != "TRAINABLE_TOKENS",
            ties=kind in ("LORA", "ADALORA"),
        )
        if kind not in _PROMPTS:
            yield from choose(reader, saved.base)
        compiled = saved.added_to((yield from compiler(reader, saved.base)), base.vocabulary_size)
        _check_replaced(reader, compiled)
    if compiled.rank > limits.rank:
        reader.problems.append(
            f"rank {compiled.rank} is over the limit of {limits.rank} (--max-adapter-rank)"
        )
    if compiled.virtual_tokens > limits.virtual_tokens:
        reader.problems.append(
            f"{compiled.virtual_tokens} virtual tokens are over the limit of {limits.virtual_tokens} "
            "(--max-virtual-tokens)"
        )
    if compiled.compiled_bytes > limits.compiled_bytes:
        reader.problems.append(
            f"{compiled.compiled_bytes} bytes are over the limit of {limits.compiled_bytes} "
            "(--max-adapter-bytes)"
        )
    reader.finish()
    return dataclasses.replace(compiled, warnings=reader.warnings.told())


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


def _compiler(folder: AdapterFolder) -> Compiler:
    """Of the folder's kind. Raises AdapterInvalid if it isn't served."""
    if is_adapterhub(folder.config):
        return compile_adapterhub
    peft_type = folder.config.get("peft_type")
    compiler = KINDS.get(peft_type) if isinstance(peft_type, str) else None
    if compiler is None:
        why = why_not_kind(peft_type)
        problem = f"peft_type {shown(peft_type)} isn't served{f': {why}' if why else ''}"
        served = f"served are {', '.join(sorted(KINDS))}, and AdapterHub's {', '.join(ADAPTERHUB_KINDS)}"
        raise AdapterInvalid(folder.name, [f"{problem}; {served}"])
    return compiler


def run_to_end(job: Generator[None, None, T]) -> T:
    """Run what comes in slices without interruption."""
    while True:
        try:
            next(job)
        except StopIteration as stop:
            result: T = stop.value
            return result
