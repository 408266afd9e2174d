"""LoRA (arXiv 2106.09685) and rsLoRA (2312.03732) as PEFT saves them, compiled to LowRank.

PEFT computes `result + lora_B(lora_A(x)) * scaling` (peft/tuners/lora/layer.py, Linear.forward) with
scaling = alpha / r, or alpha / sqrt(r) with `use_rslora`; `lora_bias` is lora_B's own bias, so it is scaled
as well. QLoRA (2305.14314) is the same on a base with its weights in nf4. An activated LoRA (2504.12397) acts
from the last occurrence of its invocation tokens in the prompt on (peft/tuners/lora/variants.py,
calculate_alora_offsets).
"""

from __future__ import annotations

from collections.abc import Generator

from polygraft.adapters.files.reader import FolderReader, shown
from polygraft.adapters.peft.per_module import PREFIX, ModuleSettings, scaling_of
from polygraft.adapters.peft.target_parameters import (
    refuse_with_parameters,
    take_parameters,
    target_parameters,
)
from polygraft.adapters.peft.targets import BAD_PATTERN, find_targets, with_tied_head
from polygraft.adapters.peft.trainable_tokens import take_trainable_tokens
from polygraft.adapters.peft.trained_biases import take_trained_biases
from polygraft.core.adapter_weights import AdapterWeights, LoraSettings, by_module
from polygraft.core.primitives import LowRank
from polygraft.core.spec import BaseSpec

# Initialisations that leave the base alone (peft/tuners/lora/layer.py, update_layer). The others (pissa,
# pissa_niter_N, olora, corda, lora_ga, loftq) move part of the base's weights into the adapter, which is then
# wrong on the base as it was.
_OF_MODULES = {"orthogonal", "mica"}
_PLAIN_INITS = {None, True, False, "gaussian", "eva", *_OF_MODULES}
TRAINING_ONLY = (
    "lora_dropout", "fan_in_fan_out", "eva_config", "corda_config", "lora_ga_config", "loftq_config",
    "megatron_config", "megatron_core", "runtime_config", "qalora_group_size",
)  # fmt: skip
"""Options of LoRA, and of the kinds whose configuration extends it, that only training reads."""


def compile_lora(reader: FolderReader, base: BaseSpec) -> Generator[None, None, AdapterWeights]:
    """Compile a LoRA folder; yields between modules. Problems are noted in the reader."""
    settings = ModuleSettings(reader, "lora_alpha")
    rslora = reader.option("use_rslora", bool, False)
    has_bias = reader.option("lora_bias", bool, False)
    dora = reader.option("use_dora", bool, False)
    if dora and has_bias:
        reader.problems.append("lora_bias with use_dora has no meaning in PEFT")
    invocation = _invocation(reader, base.vocabulary_size)
    if dora and invocation:
        reader.problems.append("alora_invocation_tokens with use_dora has no meaning in PEFT")
    init = _take_init(reader)
    parameters = target_parameters(reader, base)
    if parameters:
        others = {
            "use_dora": dora,
            "lora_bias": has_bias,
            "alora_invocation_tokens": invocation,
            "init_lora_weights": init in _OF_MODULES,
        }
        refuse_with_parameters(reader, [name for name, value in others.items() if value])
    reader.ignore(*TRAINING_ONLY)
    embedding = None if base.embedding is None else base.embedding.name
    also = [] if embedding is None else [embedding]
    found = find_targets(reader, base, also, required=parameters is None)
    targets = with_tied_head(reader, base, list(found.modules))
    biases, norms = take_trained_biases(reader, base, targets)
    primitives: dict[str, LowRank] = {}
    scalings: dict[str, float] = {}
    for module in targets:
        yield
        try:
            rank_and_alpha = settings.of(module)
        except BAD_PATTERN as error:
            settings.note_bad_pattern(error)
            break
        if rank_and_alpha is None:
            continue
        rank, alpha = rank_and_alpha
        scaling = scalings[module] = scaling_of(rank, alpha, rslora=rslora)
        if module == embedding:
            if dora or has_bias:
                reader.problems.append(f"use_dora and lora_bias aren't served on {module}, an embedding")
                continue
            names = (f"{PREFIX}{module}.lora_embedding_A", f"{PREFIX}{module}.lora_embedding_B")
            inputs, outputs = base.vocabulary_size, base.hidden_size
        else:
            names = (f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight")
            inputs, outputs = base.linears[module].in_features, base.linears[module].out_features
        a = reader.take(names[0], (rank, inputs))
        b = reader.take(names[1], (outputs, rank))
        bias = reader.take(f"{PREFIX}{module}.lora_B.bias", (outputs,)) if has_bias else None
        magnitude = reader.take(f"{PREFIX}{module}.lora_magnitude_vector", (outputs,)) if dora else None
        if a is None or b is None or (has_bias and bias is None) or (dora and magnitude is None):
            continue
        bias = None if bias is None else bias.float() * scaling
        pair = settings.paired(module, a, b, scaling, bias)
        if pair is not None:
            primitives[module] = LowRank(*pair, bias, magnitude, scaling=scaling)
    experts, routers = yield from take_parameters(reader, base, parameters or [], settings, rslora=rslora)
    adapted = embedding if embedding in scalings else None
    table = None if embedding is None else primitives.pop(embedding, None)
    return AdapterWeights(
        "lora",
        reader.parameters,
        by_module(low_rank={**primitives, **routers}, bias=biases, norm=norms),
        embedding=table,
        experts=experts,
        token_rows=take_trainable_tokens(reader, base, targets),
        invocation=invocation,
        lora=LoraSettings(
            settings.largest_rank,
            rslora,
            scalings,
            found,
            adapted,
            tied=reader.ties and adapted is not None,
            has_parameters=parameters is not None,
        ),
    )


def _invocation(reader: FolderReader, vocabulary: int) -> tuple[int, ...]:
    """The tokens that activate it, none for a plain LoRA."""
    tokens = reader.option("alora_invocation_tokens", list, [])
    for token in tokens:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocabulary:
            reader.problems.append(
                f"alora_invocation_tokens holds {shown(token)}, which is no token of the base"
            )
            return ()
    return tuple(tokens)


def _take_init(reader: FolderReader) -> object:
    """Take the option, and refuse what was trained on other base weights than those that are served."""
    init = reader.option("init_lora_weights", (bool, str), True)
    if init in _PLAIN_INITS:
        return init
    if init == "loftq":
        # PEFT's conversion doesn't know it.
        remedy = "train it after replace_lora_weights_loftq instead, which leaves them alone"
    else:
        remedy = "save it with path_initial_model_for_weight_conversion, which turns it into a plain LoRA"
    reader.problems.append(f"init_lora_weights={init!r} changes the base's weights; {remedy}")
    return init
