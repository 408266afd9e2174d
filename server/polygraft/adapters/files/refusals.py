"""Which options and kinds aren't served, and why, for error messages.

A kind is refused if no compiler is registered for it. An option that no compiler took is refused if PEFT 0.21
knows it for the kind, or if it is known to change what is computed. PEFT drops all others when it loads a
folder (`from_peft_type` in peft/config.py), and so does Polygraft, with a warning. Tests keep the tables
complete, by PEFT's own lists.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

_OPTIONS: Mapping[str, str] = {
    "modules_to_save": "this kind saves no modules, in PEFT it has no effect; remove it",
    "target_parameters": "only LoRA adapts parameters that are no module's weight; remove it",
    "layer_replication": "it makes the base deeper, and there is one base for all adapters",
    "alora_invocation_tokens": "only plain LoRA begins inside a prompt, PEFT ignores it here; remove it",
    "use_qalora": "QA-LoRA pools its input in groups before lora_A, which no primitive does",
    "use_bdlora": "block-diagonal factors have shapes of their own; save them as plain lora_A and lora_B",
    "arrow_config": "Arrow chooses among several LoRAs for each token; load the one that is wanted by itself",
    "kasa_config": "KaSA removes part of the base's weights, and there is one base for all adapters",
    "velora_config": "VeLoRA also saves how it compressed activations, which has no use after training; "
    "remove the option and the lora_velora_embed tensors",
    "monteclora_config": "MonteCLoRA also saves its sampler, which has no use after training; "
    "remove the option and the lora_monteclora_sampler tensors",
    "use_dora": "this kind has no magnitude of its own, in PEFT it has no meaning; remove it",
    "use_rslora": "this kind has no rank-stabilized scaling, in PEFT it has no effect; remove it",
    "alpha_pattern": "this kind has one alpha for all modules, in PEFT it has no effect; remove it",
    "sample_at_inference": "it adds noise of its own to every forward, so no answer would be the same twice",
    "lora_bias": "this kind has no bias of its own, in PEFT it has no effect; remove it",
}

WHY_NOT_KINDS: Mapping[str, str] = {
    "ADAMSS": "it groups outputs by a clustering of the base's weights, which isn't in the file and comes "
    "out otherwise where rounding does",
    "ADAPTION_PROMPT": "it gates attention to a prompt inside some layers, which no primitive does",
    "LILY": "it weighs experts by an average over all tokens of a call, so answers depend on the neighbours "
    "and on how a prompt is cut",
    "PSOFT": "it turns singular vectors of the base's weights into each other, and their signs, which differ "
    "from one decomposition to another, aren't in the file",
    "SHADOW": "it runs a second network beside the base",
    "XLORA": "it weighs several LoRAs for each token by what a first run of the base makes of it, which no "
    "primitive does; its LoRAs can be served one by one",
}
"""By `peft_type`: why PEFT's other kinds aren't served."""


_CHANGES: Mapping[str, str] = {
    "enable_lora": "before PEFT 0.4 it adapted parts of a fused module, by weights of another shape",
    "use_mora": "MoRA's square matrix is no low-rank product",
    "mora_type": "MoRA's square matrix is no low-rank product",
    "weight_decompose": "LyCORIS' weight decomposition rescales the base's weights",
    "dora_wd": "LyCORIS' weight decomposition rescales the base's weights",
    "lora_nums": "HydraLoRA weighs several B for each token, which no primitive does",
    "num_experts": "it weighs several LoRAs for each token, which no primitive does",
}
"""Options of other libraries and of older PEFT that change what is computed, although PEFT drops them."""


def judge_option(unserved: Collection[str] | None, key: str) -> tuple[bool, str]:
    """Whether to refuse an option that no kind took, and why ("" if unknown).

    Args:
        unserved: options that PEFT knows for the kind and the kind doesn't take; None for a folder of another
            library, whose options are all refused.

    Returns:
        whether to refuse it rather than drop it as PEFT does, and the reason.
    """
    if key in _CHANGES:
        return True, _CHANGES[key]
    return unserved is None or key in unserved, _OPTIONS.get(key, "")


def why_not_kind(peft_type: object) -> str:
    """The reason why a peft_type without a compiler isn't served; empty for an unknown one."""
    return WHY_NOT_KINDS.get(peft_type, "") if isinstance(peft_type, str) else ""
