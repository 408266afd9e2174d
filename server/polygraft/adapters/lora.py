"""LoRA (arXiv 2106.09685) and rsLoRA (2312.03732) as PEFT saves them, compiled to LowRank.

PEFT computes `result + lora_B(lora_A(x)) * scaling` (peft/tuners/lora/layer.py, Linear.forward) with
scaling = alpha / r, or alpha / sqrt(r) with `use_rslora`; `lora_bias` is lora_B's own bias, so it is scaled
as well.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Generator

import torch

from polygraft.adapters.primitives import CompiledAdapter, LowRank
from polygraft.adapters.reader import FolderReader, shown
from polygraft.adapters.targets import BAD_PATTERN, matching_key, target_modules
from polygraft.base.spec import BaseSpec

_PREFIX = "base_model.model."
# Initialisations that leave the base alone. The others (pissa, olora, corda, loftq, lora_ga, ...) move part
# of the base's weights into the adapter, which is then wrong on the base as it was.
_PLAIN_INITS = {None, True, False, "gaussian", "orthogonal", "eva"}
_TRAINING_ONLY = (
    "lora_dropout", "fan_in_fan_out", "eva_config", "corda_config", "lora_ga_config", "loftq_config",
    "megatron_config", "megatron_core", "runtime_config", "qalora_group_size", "ensure_weight_tying",
)  # fmt: skip


def compile_lora(reader: FolderReader, base: BaseSpec) -> Generator[None, None, CompiledAdapter]:
    """Compile a LoRA folder; yields between modules. Problems are noted in the reader."""
    rank = reader.option("r", int, 8)
    alpha = reader.option("lora_alpha", (int, float), 8)
    rank_pattern = reader.option("rank_pattern", dict, {})
    alpha_pattern = reader.option("alpha_pattern", dict, {})
    rslora = reader.option("use_rslora", bool, False)
    has_bias = reader.option("lora_bias", bool, False)
    init = reader.option("init_lora_weights", (bool, str), True)
    if init not in _PLAIN_INITS:
        reader.problems.append(
            f"init_lora_weights={init!r} changes the base's weights; save it with "
            "path_initial_model_for_weight_conversion, which turns it into a plain LoRA"
        )
    if reader.option("bias", str, "none") != "none":
        reader.problems.append("bias other than 'none' replaces the base's biases, which isn't served")
    reader.ignore(*_TRAINING_ONLY)
    primitives: dict[str, LowRank] = {}
    for module in target_modules(reader, base):
        yield
        shape = base.linears[module]
        try:
            module_rank = rank_pattern.get(matching_key(rank_pattern, module), rank)
            module_alpha = alpha_pattern.get(matching_key(alpha_pattern, module), alpha)
        except BAD_PATTERN as error:
            reader.problems.append(
                f"rank_pattern or alpha_pattern is not a regular expression that can be matched: {error}"
            )
            break
        if not _is_rank(module_rank) or not _is_alpha(module_alpha):
            reader.problems.append(
                f"rank {shown(module_rank)} with alpha {shown(module_alpha)} for {module} makes no sense"
            )
            continue
        copied = f"{_PREFIX}{module}.base_layer.weight"
        if copied in reader.names():
            reader.take(copied, (None, None))
            reader.problems.append(
                f"it carries a copy of the base's {module}, which isn't served; save it with "
                "save_embedding_layers=False"
            )
        scaling = module_alpha / (math.sqrt(module_rank) if rslora else module_rank)
        a = reader.take(f"{_PREFIX}{module}.lora_A.weight", (module_rank, shape.in_features))
        b = reader.take(f"{_PREFIX}{module}.lora_B.weight", (shape.out_features, module_rank))
        bias = reader.take(f"{_PREFIX}{module}.lora_B.bias", (shape.out_features,)) if has_bias else None
        if a is None or b is None or (has_bias and bias is None):
            continue
        # A module's two matrices have one type, whatever the file's have. Scaled in float32, so that a
        # scaling that is no power of two costs one rounding and not two.
        dtype = torch.promote_types(a.dtype, b.dtype)
        scaled = (b.float() * scaling).to(dtype)
        bias = None if bias is None else bias.float() * scaling
        if not scaled.isfinite().all() or (bias is not None and not bias.isfinite().all()):
            reader.problems.append(f"scaling {scaling} makes weights of {module} infinite")
            continue
        primitives[module] = LowRank(a.to(dtype).contiguous(), scaled, bias)
    return CompiledAdapter("lora", reader.parameters, low_rank=primitives)


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**31


def _is_alpha(value: object) -> bool:
    # NaN fails the comparison.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
