"""Makes the golden fixtures of this folder: adapters saved by AdapterHub's own library, and its logits.

It runs in an environment of its own, since `adapters` pins an older transformers than the server needs:

    python -m venv build/adapterhub
    build/adapterhub/bin/pip install torch==2.13.0 adapters==1.3.0 safetensors
    build/adapterhub/bin/python tests/adapterhub/make_fixtures.py

`fixtures/ARCHITECTURE/base` is a tiny model that transformers 5 reads as well; beside it lie a folder for
each of its adapters and `expected.safetensors`, the float32 logits of some of `PROMPT`'s rows under each of
them, [ROWS, vocabulary], with eager attention, which is what the library's prefix tuning is made for.
`bfloat16.json` holds the library's own error in bfloat16, root mean square over all rows. Where the library can't save safetensors, since tensors are shared, one copy of each is saved here; two such folders
are also kept as the pickles that it writes, for `polygraft adapters convert`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from adapters.configuration.adapter_config import VeraConfig
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
    Qwen2Config,
)

import adapters
from adapters import (
    AdapterConfig,
    AutoAdapterModel,
    BnConfig,
    CompacterConfig,
    CompacterPlusPlusConfig,
    ConfigUnion,
    DoRAConfig,
    DoubleSeqBnConfig,
    DoubleSeqBnInvConfig,
    IA3Config,
    LoRAConfig,
    MAMConfig,
    ParBnConfig,
    PrefixTuningConfig,
    SeqBnConfig,
    SeqBnInvConfig,
    UniPELTConfig,
)

FIXTURES = Path(__file__).parent / "fixtures"
PROMPT = [72, 101, 5, 222, 13, 108, 111, 32, 119, 7, 255, 33]
ROWS = slice(5, None, 6)
VOCABULARY = 288
ROPE_THETA = 300.0
_LLAMA_LIKE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 256,
    "pad_token_id": 257,
}
BASES = {
    "llama": lambda: LlamaConfig(**_LLAMA_LIKE, rope_theta=ROPE_THETA),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_inner=48, n_layer=2, n_head=4, n_positions=128,
        bos_token_id=None, eos_token_id=256, pad_token_id=257,
    ),
    # Served by the library's plug-in interface, through hooks on modules.
    "qwen2": lambda: Qwen2Config(**_LLAMA_LIKE, rope_theta=ROPE_THETA),
    "gemma3_text": lambda: Gemma3TextConfig(**_LLAMA_LIKE, head_dim=8, sliding_window=64),
}  # fmt: skip

NON_LINEARITIES = (
    "relu", "gelu", "gelu_new", "gelu_fast", "gelu_accurate", "gelu_python", "gelu_pytorch_tanh",
    "gelu_python_tanh", "gelu_10", "silu", "swish", "tanh", "sigmoid", "leakyrelu", "leaky_relu", "linear",
    "relu2", "relu6", "mish", "quick_gelu", "laplace", "prelu",
)  # fmt: skip
SMALL = {"reduction_factor": 4}

ADAPTERS: dict[str, AdapterConfig] = {
    "seq_bn": SeqBnConfig(),
    "double_seq_bn": DoubleSeqBnConfig(),
    "par_bn": ParBnConfig(reduction_factor=4),
    "par_bn-attention": ParBnConfig(mh_adapter=True, output_adapter=False, **SMALL),
    "ln_before": SeqBnConfig(ln_before=True, **SMALL),
    "ln_after": DoubleSeqBnConfig(ln_after=True, **SMALL),
    "ln_after-inside": DoubleSeqBnConfig(ln_after=True, adapter_residual_before_ln=True, **SMALL),
    "ln_after-sum": SeqBnConfig(ln_after=True, residual_before_ln=False, **SMALL),
    "ln_after-sum-inside": SeqBnConfig(
        ln_before=True, ln_after=True, residual_before_ln=False, adapter_residual_before_ln=True, **SMALL
    ),
    "par_bn-ln": ParBnConfig(ln_before=True, ln_after=True, **SMALL),
    "residual-sum": SeqBnConfig(residual_before_ln=False, **SMALL),
    "residual-inside": SeqBnConfig(adapter_residual_before_ln=True, **SMALL),
    "no-original-ln-after": SeqBnConfig(original_ln_after=False, residual_before_ln=False, **SMALL),
    "adapter-plus": BnConfig(
        mh_adapter=False,
        output_adapter=True,
        original_ln_before=True,
        original_ln_after=False,
        residual_before_ln=False,
        scaling="channel",
        non_linearity="gelu",
        **SMALL,
    ),
    "no-residual": SeqBnConfig(original_ln_after=False, **SMALL),
    "scaling": SeqBnConfig(scaling=2.5, **SMALL),
    "scaling-learned": ParBnConfig(scaling="learned", **SMALL),
    "scaling-channel": DoubleSeqBnConfig(scaling="channel", **SMALL),
    "leave_out": DoubleSeqBnConfig(leave_out=[0], **SMALL),
    "reduction-map": DoubleSeqBnConfig(reduction_factor={"1": 2, "default": 8}),
    "reduction-odd": SeqBnConfig(reduction_factor=6.5),
    "up-projection": SeqBnConfig(reduction_factor=0.5),
    "one-wide": SeqBnConfig(reduction_factor=100),
    "seq_bn_inv": SeqBnInvConfig(reduction_factor=4),
    "double_seq_bn_inv": DoubleSeqBnInvConfig(reduction_factor=4, inv_adapter_reduction_factor=3),
    "prelu_inv": SeqBnInvConfig(non_linearity="prelu", reduction_factor=4),
    "compacter": CompacterConfig(reduction_factor=4),
    "compacter++": CompacterPlusPlusConfig(reduction_factor=4),
    "phm-own-rule": CompacterPlusPlusConfig(reduction_factor=4, shared_phm_rule=False),
    "phm-factorized-rule": CompacterConfig(reduction_factor=4, factorized_phm_rule=True, phm_dim=2),
    "phm-own-factorized-rule": CompacterPlusPlusConfig(
        reduction_factor=4, shared_phm_rule=False, factorized_phm_rule=True
    ),
    "phm-whole-w": CompacterPlusPlusConfig(reduction_factor=2, factorized_phm_W=False),
    "phm-shared-w": CompacterConfig(reduction_factor=4, shared_W_phm=True, phm_rank=2),
    "phm-no-bias": CompacterPlusPlusConfig(reduction_factor=4, phm_bias=False),
    "lora": LoRAConfig(r=4, alpha=6),
    "lora-everywhere": LoRAConfig(
        r=3, alpha=5, attn_matrices=["q", "k", "v"], intermediate_lora=True, output_lora=True, leave_out=[1]
    ),
    "lora-one": LoRAConfig(r=2, attn_matrices=["k"]),
    "lora-mlp": LoRAConfig(r=2, selfattn_lora=False, output_lora=True),
    "ia3": IA3Config(),
    "ia3-alpha": IA3Config(alpha=2, attn_matrices=["q", "v"], output_lora=True),
    "union-bn": ConfigUnion(
        SeqBnConfig(reduction_factor=8),
        ParBnConfig(mh_adapter=True, output_adapter=False, reduction_factor=4),
    ),
    "union-lora-bn": ConfigUnion(LoRAConfig(r=2, leave_out=[0]), DoubleSeqBnConfig(reduction_factor=8)),
}
ACTIVATIONS = {
    f"act-{name}": DoubleSeqBnConfig(non_linearity=name, reduction_factor=8, mh_adapter=False)
    for name in NON_LINEARITIES
}
UNGATED = {"use_gating": False}
PREFIXES: dict[str, AdapterConfig] = {
    "prefix": PrefixTuningConfig(prefix_length=5, bottleneck_size=12),
    "prefix-flat": PrefixTuningConfig(prefix_length=7, flat=True),
    "prefix-leave_out": PrefixTuningConfig(
        prefix_length=19, bottleneck_size=8, leave_out=[0], non_linearity="gelu"
    ),
    "prefix-flat-leave_out": PrefixTuningConfig(prefix_length=3, flat=True, leave_out=[1]),
    "prefix-one": PrefixTuningConfig(prefix_length=1, bottleneck_size=8),
    "mam": MAMConfig(PrefixTuningConfig(prefix_length=4, bottleneck_size=8), ParBnConfig(reduction_factor=4)),
    "unipelt-ungated": ConfigUnion(
        *[
            part.replace(use_gating=False)
            for part in UniPELTConfig(
                PrefixTuningConfig(prefix_length=4, bottleneck_size=8),
                SeqBnConfig(reduction_factor=8),
                LoRAConfig(r=2, alpha=3),
            ).configs
        ]
    ),
}
ON_QWEN2 = (
    "seq_bn", "double_seq_bn", "par_bn", "ln_after-inside", "residual-sum", "scaling-channel", "leave_out",
    "seq_bn_inv", "compacter", "lora-everywhere", "lora-mlp", "ia3-alpha", "union-bn",
)  # fmt: skip
ALL: dict[str, dict[str, AdapterConfig]] = {
    "llama": {
        **ADAPTERS,
        **ACTIVATIONS,
        **PREFIXES,
        "vera": VeraConfig(r=6, alpha=3, attn_matrices=["q"]),
        "dora": DoRAConfig(r=4, alpha=4, attn_matrices=["q", "v"], intermediate_lora=True),
    },
    "gpt2": {
        **ADAPTERS,
        **PREFIXES,
        "vera-mlp": VeraConfig(r=6, selfattn_lora=False, intermediate_lora=True),
    },
    "qwen2": {key: ADAPTERS[key] for key in ON_QWEN2},
    # Bottlenecks act before Gemma's norms, which isn't served.
    "gemma3_text": {
        **{key: ADAPTERS[key] for key in ("lora-everywhere", "ia3-alpha", "seq_bn")},
        "inv-alone": SeqBnInvConfig(output_adapter=False),
    },
}
# Through the library's own class for flexible heads, which inverts a coupling before the head.
FLEXIBLE = {"seq_bn_inv-flexible": SeqBnInvConfig(reduction_factor=4)}
PICKLES = ("ln_before", "mam")


def visible(model: PreTrainedModel, name: str) -> None:
    """Give an adapter random weights that change the logits plainly."""
    for key, parameter in model.named_parameters():
        if f".{name}." not in key or "prefix_tuning.pool" in key:
            continue
        if "norm" in key or key.endswith(("scaling", ".m.weight")):
            parameter.mul_(1 + 0.4 * torch.randn(parameter.shape))
            if key.endswith("bias"):
                parameter.normal_(std=0.2)
        elif key.endswith(".f.weight"):  # PReLU's slope
            parameter.fill_(0.3)
        elif "loras" in key and model.adapters_config.match(name, LoRAConfig).composition_mode == "scale":
            parameter.normal_(mean=1.0, std=0.4)
        elif key.endswith((".vera_B", ".vera_D")):
            parameter.copy_(torch.diag(torch.randn(len(parameter))))
        elif "prefix_tunings" in key:
            parameter.normal_(std=0.7)
        elif "phm_rule" in key:
            parameter.normal_(std=0.8)
        elif "W_" in key or key.endswith(".W"):
            parameter.normal_(std=0.5)
        else:
            parameter.normal_(std=0.25)


def base_model(architecture: str) -> PreTrainedModel:
    """A tiny random model whose weights are large enough for attention to matter."""
    torch.manual_seed(0)
    config = BASES[architecture]()
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.2)
        elif "bias" in name:
            parameter.normal_(std=0.1)
        else:
            parameter.mul_(1 + 0.2 * torch.randn(parameter.shape))
    model.tie_weights()
    return model.eval()


def unshared(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One of each group of names for the same tensor, the shortest."""
    kept: dict[tuple[Any, ...], str] = {}
    for name in sorted(tensors, key=lambda name: (len(name), name)):
        tensor = tensors[name]
        kept.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride()), name)
    return {name: tensors[name].contiguous() for name in sorted(kept.values())}


def save(model: PreTrainedModel, name: str, folder: Path) -> None:
    """Save one adapter as safetensors, by the library where it can."""
    try:
        model.save_adapter(folder, name, use_safetensors=True, with_head=False)
    except RuntimeError:  # tensors are shared
        model.save_adapter(folder, name, with_head=False)
        tensors = torch.load(folder / "pytorch_adapter.bin", weights_only=True)
        save_file(unshared(tensors), folder / "adapter.safetensors")
        (folder / "pytorch_adapter.bin").unlink()


def logits(model: PreTrainedModel) -> torch.Tensor:
    """Of the prompt, [prompt, vocabulary]."""
    return model(torch.tensor([PROMPT]), use_cache=False).logits[0].float().contiguous()


def bfloat16_error(model: PreTrainedModel, exact: torch.Tensor) -> float:
    """Of the logits in bfloat16, root mean square; the model is left as it was."""
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    computed = {name: tensor.clone() for name, tensor in model.named_buffers() if name not in weights}

    def restore() -> None:  # they stay in float32 when a model is loaded in bfloat16
        for name, tensor in computed.items():
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, tensor)

    model.bfloat16()
    restore()
    error = logits(model) - exact
    model.float()
    restore()
    model.load_state_dict(weights)
    return error.square().mean().sqrt().item()


def run(
    model: PreTrainedModel, key: str, config: AdapterConfig, folder: Path, errors: dict[str, float]
) -> torch.Tensor:
    """Add an adapter, save it and return the logits under it."""
    name = "".join(c if c.isalnum() else "_" for c in key)
    torch.manual_seed(sum(map(ord, key)))
    model.add_adapter(name, config=config)
    model.eval()
    with torch.no_grad():
        visible(model, name)
    model.set_active_adapters(name)
    out = logits(model)
    errors[key] = bfloat16_error(model, out)
    assert torch.equal(logits(model), out)
    save(model, name, folder / key)
    if key in PICKLES and folder.name == "llama":
        pickles = folder.parent / "llama-pickles" / key
        pickles.mkdir(parents=True, exist_ok=True)
        model.save_adapter(pickles, name, with_head=False)
    model.set_active_adapters(None)
    model.delete_adapter(name)
    return out


def make(architecture: str) -> None:
    """All fixtures of one architecture."""
    folder = FIXTURES / architecture
    shutil.rmtree(folder, ignore_errors=True)
    plain = base_model(architecture)
    plain.save_pretrained(folder / "base")
    plain.config._name_or_path = f"tiny-{architecture}"
    plain.set_attn_implementation("eager")
    expected = {"base": logits(plain)}
    errors: dict[str, float] = {}
    adapters.init(plain)
    for key, config in ALL[architecture].items():
        expected[key] = run(plain, key, config, folder, errors)
    if architecture in ("llama", "gpt2"):
        flexible = AutoAdapterModel.from_pretrained(folder / "base", attn_implementation="eager").eval()
        flexible.config._name_or_path = f"tiny-{architecture}"
        assert torch.equal(logits(flexible), expected["base"])
        for key, config in FLEXIBLE.items():
            expected[key] = run(flexible, key, config, folder, errors)
    save_file({key: out[ROWS].contiguous() for key, out in expected.items()}, folder / "expected.safetensors")
    (folder / "bfloat16.json").write_text(json.dumps(errors, indent=1) + "\n")
    for key, out in expected.items():
        distance = (out - expected["base"]).abs().max().item()
        print(f"{architecture:6} {key:24} {distance:8.3f}")
        assert key == "base" or (0.02 < distance < 100 and out.isfinite().all())
    for extra in folder.rglob("generation_config.json"):
        extra.unlink()


def main() -> None:
    """Everything."""
    torch.set_grad_enabled(False)
    shutil.rmtree(FIXTURES / "llama-pickles", ignore_errors=True)
    for architecture in BASES:
        make(architecture)
    rows = list(range(len(PROMPT)))[ROWS]
    (FIXTURES / "prompt.json").write_text(json.dumps({"tokens": PROMPT, "rows": rows}) + "\n")


if __name__ == "__main__":
    main()
