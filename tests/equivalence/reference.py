"""What the libraries answer: one unpadded request at a time."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, PeftType
from peft.tuners.deft.layer import DeftLayer
from peft.tuners.frod.layer import FrodLayer
from peft.tuners.glora import GloraLinear
from peft.tuners.hra import HRALinear
from peft.tuners.ia3 import IA3Layer
from peft.tuners.lora import LoraLayer
from peft.tuners.osf.layer import OSFLayer
from peft.tuners.osf.utils import decompose_weight_matrix
from peft.tuners.peanut.layer import PeanutLayer
from peft.tuners.pvera.layer import PveraLayer
from peft.tuners.randlora.layer import RandLoraLayer
from peft.tuners.road.layer import RoadLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from polygraft.adapters.files.adapterhub_form import ADAPTERHUB_WEIGHTS
from polygraft.base.bitsandbytes import leave_unpacked
from polygraft.layers.linear.merging import dense_weight
from tests.adapterhub.folders import compiled_for
from tests.adapterhub.reference import adapted

# What PEFT can't do: LoHa and LoKr take a packed weight's shape for the module's, HRA multiplies by what a
# quantized module keeps as if that were its weight, AdaLoRA over eight bits returns float32 from its modules, which
# attention refuses beside the others' bfloat16, and SHiRA multiplies by a float32 weight. DeLoRA takes a norm of the
# packed numbers, TinyLoRA their singular values, DEFT and PEANuT multiply a matrix by them, Uni-LoRA makes its scales whole, and Super-Tuning multiplies by them.
_QUANTIZED = ("int8", "nf4", "fp4")
CANT = {
    PeftType.LOHA: ("nf4", "fp4"), PeftType.LOKR: ("nf4", "fp4"), PeftType.HRA: _QUANTIZED,
    PeftType.ADALORA: ("int8",), PeftType.SHIRA: ("int8",),
    PeftType.DELORA: _QUANTIZED, PeftType.TINYLORA: _QUANTIZED, PeftType.UNILORA: _QUANTIZED,
    PeftType.SUPERTUNING: _QUANTIZED, PeftType.DEFT: ("nf4", "fp4"), PeftType.PEANUT: _QUANTIZED,
    PeftType.GLORA: _QUANTIZED, PeftType.OSF: _QUANTIZED, PeftType.FROD: _QUANTIZED,
}  # fmt: skip
# Those whose change is made of the base's weights.
OF_BASE = (DeftLayer, FrodLayer, OSFLayer, PeanutLayer)
# Those that return float32 from modules over quantized weights.
WIDE = (IA3Layer, PveraLayer, RandLoraLayer, RoadLayer)


@dataclass(frozen=True)
class Reference:
    """Greedy tokens, and the float logits [steps, vocabulary] behind each."""

    tokens: list[int]
    logits: torch.Tensor


def load_reference(model_folder: Path, adapter_folder: Path | None, precision: str) -> torch.nn.Module:
    """A model with its adapter, as PEFT loads it, or with AdapterHub's in hooks."""
    dtypes = {"float32": torch.float32, "float16": torch.float16}
    options: dict[str, object] = {"dtype": dtypes.get(precision, torch.bfloat16)}
    if precision in ("nf4", "fp4"):
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=precision,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    elif precision == "int8":
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    if "quantization_config" in options:
        options["device_map"] = "cpu"
    if json.loads((model_folder / "config.json").read_text()).get("attn_logit_softcapping"):
        options["attn_implementation"] = "eager"  # sdpa, transformers 5.17's choice, caps no scores
    model = AutoModelForCausalLM.from_pretrained(model_folder, **options)
    if "quantization_config" in options:
        leave_unpacked(model)  # what its packed form can't hold
    if adapter_folder is not None and (adapter_folder / ADAPTERHUB_WEIGHTS).exists():
        # Its library needs another transformers; tests/adapterhub holds these hooks against it.
        context = adapted(model, *compiled_for(model_folder, adapter_folder))
        context.__enter__()
        model.kept_adapted = context
    elif adapter_folder is not None:
        config = PeftConfig.from_pretrained(str(adapter_folder))
        if getattr(config, "use_dora", False) and "quantization_config" in options:
            _dora_by_hand(model, load_reference(model_folder, adapter_folder, "float32"))
        elif precision in CANT.get(config.peft_type, ()):
            _add_by_hand(model, load_reference(model_folder, adapter_folder, "float32"))
        else:
            model = PeftModel.from_pretrained(model, str(adapter_folder))
            if precision != "float32":
                _round_scaled(model, dtypes.get(precision, torch.bfloat16))
    return model.eval()


def _add_by_hand(model: torch.nn.Module, exact: torch.nn.Module) -> None:
    """Add what a kind adds in float32 behind the modules of a quantized model, as PEFT's layers would."""
    for name, layer in exact.base_model.model.named_modules():
        if isinstance(layer, BaseTunerLayer):
            if isinstance(layer, OF_BASE):
                _make_of(layer, dense_weight(model.get_submodule(name)).float())
            more = torch.zeros(layer.out_features)
            if isinstance(layer, GloraLinear):
                delta, more = _glora_by_hand(layer, model.get_submodule(name))
            else:
                delta = layer.get_delta_weight("default").detach()
            delta = delta.to_dense() if delta.is_sparse else delta
            if isinstance(layer, HRALinear):  # a factor of the weight, not what it gains
                delta = dense_weight(model.get_submodule(name)).float() @ (delta - torch.eye(len(delta)))
            if getattr(layer, "fan_in_fan_out", False):
                delta = delta.T

            def add(
                module: torch.nn.Module,
                args: tuple[torch.Tensor],
                out: torch.Tensor,
                delta: torch.Tensor = delta,
                more: torch.Tensor = more,
            ) -> torch.Tensor:
                return (out + torch.nn.functional.linear(args[0].float(), delta, more)).to(out.dtype)

            model.get_submodule(name).register_forward_hook(add)


def _make_of(layer: BaseTunerLayer, weight: torch.Tensor) -> None:
    """Give a layer another base's weight [out_features, in_features], and what PEFT makes of that when it loads."""
    turned = getattr(layer, "fan_in_fan_out", False)
    layer.get_base_layer().weight.data = weight.T if turned else weight
    if isinstance(layer, OSFLayer):
        parts = decompose_weight_matrix(weight, layer.effective_rank["default"])
        for part in ("U_low", "S_low", "V_low"):
            getattr(layer, f"_osf_{part}_init")["default"] = parts[part].detach()
    elif isinstance(layer, FrodLayer):
        layer.frod_U["default"] = layer._calculate_frod_u_and_lambda(layer.frod_V["default"], weight)[0]


def _glora_by_hand(layer: GloraLinear, module: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """What a quantized module's weight and bias gain; PEFT leaves such modules alone."""
    a, b, c, d, e = (getattr(layer, f"glora_{path}")["default"]().detach().float() for path in "ABCDE")
    weight = dense_weight(module).float()
    if layer.bias is None:
        return weight * a + b, torch.zeros(len(weight))
    own, trained = module.bias.detach().float(), layer.bias.detach()
    return weight * a + b, trained - own + trained * d + e + (weight @ c).squeeze(-1)


def _dora_by_hand(model: torch.nn.Module, exact: torch.nn.Module) -> None:
    """DoRA over a quantized model by what its weights stand for: once the CPU kernel has packed a 4-bit weight,
    the norm that PEFT takes of it is garbage."""
    for name, layer in exact.base_model.model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        module = model.get_submodule(name)
        added = (
            layer.lora_B["default"].weight @ layer.lora_A["default"].weight * layer.scaling["default"]
        ).detach()
        magnitude = layer.lora_magnitude_vector["default"].weight.detach()
        with torch.inference_mode():
            factor = magnitude / (dense_weight(module).float() + added).norm(dim=1)

        def scale(
            module: torch.nn.Module,
            args: tuple[torch.Tensor],
            out: torch.Tensor,
            added: torch.Tensor = added,
            factor: torch.Tensor = factor,
        ) -> torch.Tensor:
            bias = 0.0 if module.bias is None else module.bias.float()
            both = out.float() - bias + torch.nn.functional.linear(args[0].float(), added)
            return (both * factor + bias).to(out.dtype)

        module.register_forward_hook(scale)


def _round_scaled(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Bring what these kinds return over quantized modules to the others' type: attention refuses both."""
    for module in model.modules():
        if isinstance(module, WIDE):
            module.register_forward_hook(lambda module, args, out: out.to(dtype))


def generate(model: torch.nn.Module, prompt: list[int], steps: int) -> Reference:
    """Greedy tokens by the library's own `generate`, end of sequence ignored."""
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=steps,
            min_new_tokens=steps,
            do_sample=False,
            eos_token_id=None,
            **task_of(model),
            output_logits=True,
            return_dict_in_generate=True,
        )
    tokens = out.sequences[0].tolist()[-steps:]
    return Reference(tokens, torch.stack([step[0].float() for step in out.logits]))


def task_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The first task, for a kind that asks each request for one."""
    config = getattr(model, "active_peft_config", None)
    several = config is not None and config.peft_type in (PeftType.MULTITASK_PROMPT_TUNING, PeftType.POLY)
    return {"task_ids": torch.tensor([0])} if several else {}


def forced(model: torch.nn.Module, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """Logits [len(tokens), vocabulary] where the given tokens are forced, by generating each alone."""
    rows = [generate(model, prompt + tokens[:k], 1).logits[0] for k in range(len(tokens))]
    return torch.stack(rows)
