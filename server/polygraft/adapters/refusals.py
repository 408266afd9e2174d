"""Why an option or a kind that PEFT knows isn't served: what an error tells beside "isn't served".

Nothing is served or refused by these tables: an option is refused because no compiler took it, a kind because
none is registered. The kinds are those of PEFT 0.21 (peft/utils/peft_types.py); a test keeps them complete.
"""

from __future__ import annotations

from collections.abc import Mapping

_OPTIONS: Mapping[str, str] = {
    "modules_to_save": "this kind saves no modules, in PEFT it has no effect; remove it",
    "trainable_token_indices": "this kind has no trained tokens, in PEFT it has no effect; remove it",
    "ensure_weight_tying": "this kind ties nothing, in PEFT it has no effect; remove it",
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
    "use_rslora": "this kind has no rank-stabilized scaling, in PEFT it has no effect; remove it",
    "alpha_pattern": "this kind has one alpha for all modules, in PEFT it has no effect; remove it",
    "sample_at_inference": "it adds noise of its own to every forward, so no answer would be the same twice",
    "lora_bias": "this kind has no bias of its own, in PEFT it has no effect; remove it",
}


_KINDS: Mapping[str, str] = {
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


def why_not_option(key: str) -> str:
    """The reason why a configuration key that no compiler took isn't served; empty for an unknown one."""
    return _OPTIONS.get(key, "")


def why_not_kind(peft_type: object) -> str:
    """The reason why a peft_type without a compiler isn't served; empty for an unknown one."""
    return _KINDS.get(peft_type, "") if isinstance(peft_type, str) else ""
