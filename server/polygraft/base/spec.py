"""What an adapter must know of the base model to be checked against it and compiled for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from polygraft.base.residual_sites import ResidualSite, WatchSums
from polygraft.errors import UnsupportedArchitecture
from polygraft.layers.attention import AttentionSite, probed_sites

_PROBE_ROWS = 3


@dataclass(frozen=True, slots=True)
class LinearShape:
    """A module that low-rank adapters can target. `is_head`: it computes the logits."""

    in_features: int
    out_features: int
    is_head: bool = False
    has_bias: bool = False


@dataclass(frozen=True, slots=True)
class BaseSpec:
    """Names and shapes of a base model.

    Args:
        name: as in its config, such as "HuggingFaceTB/SmolLM2-135M-Instruct"; may be empty.
        architecture: transformers' model type.
        linears: by module name; each sees every row of a step exactly once (the head: every sampled one).
        same_input: names of `linears` in groups that read the same tensor, such as q, k and v.
        others: every other module's name and class name, for telling why it can't be targeted.
        attention: by module name, in the model's order.
        residual: sites of bottleneck adapters by name; none where layers aren't made for them.
        parameters: of the whole model, tied ones counted once.
    """

    name: str
    architecture: str
    linears: Mapping[str, LinearShape]
    same_input: tuple[tuple[str, ...], ...]
    others: Mapping[str, str]
    attention: Mapping[str, AttentionSite]
    residual: Mapping[str, ResidualSite]
    hidden_size: int
    vocabulary_size: int
    parameters: int


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(in_features, out_features) of a linear module of any make, or None."""
    if isinstance(module, nn.Linear):  # bitsandbytes' quantized ones are its subclasses
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    return None


def not_through_interface(architecture: str) -> str:
    """Why an architecture with attention of its own isn't served."""
    return f"{architecture} doesn't send its attention through transformers' AttentionInterface"


def _probe(model: PreTrainedModel, rows: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Run a few rows, given as the model takes them, as a packed step would.

    Returns:
        the last row's logits [vocabulary].
    """
    device = next(model.parameters()).device
    logits: torch.Tensor = model(
        **rows,
        position_ids=torch.arange(_PROBE_ROWS, device=device)[None],
        # Of two dimensions, so that each layer gets a mask made, which tells whom it sees.
        attention_mask=torch.ones(1, _PROBE_ROWS, dtype=torch.long, device=device),
        use_cache=False,
        logits_to_keep=torch.tensor([_PROBE_ROWS - 1], device=device),
    ).logits[0, -1]
    return logits


def _rows_are_apart(model: PreTrainedModel, ids: torch.Tensor) -> bool:
    """Whether the last row stays finite behind rows that aren't numbers.

    `Probe` lets no row attend to another, so what reaches it comes by another way: a convolution or a
    recurrence, which would carry one request's state into the next.
    """
    embedded = model.get_input_embeddings()(ids)
    embedded[:, :-1] = torch.nan
    return bool(_probe(model, {"inputs_embeds": embedded}).isfinite().all())


def inspect_base(model: PreTrainedModel, name: str) -> BaseSpec:
    """Run a few rows through a model, on whatever device it is (meta too), and note what it is made of.

    Raises:
        UnsupportedArchitecture: a layer doesn't reach attention through transformers' interface, sees other
            keys than those in a causal window, or mixes rows outside attention (which meta can't show).
    """
    config = model.config.get_text_config()
    # Counted before the first forward packs quantized weights; tied ones once, those of four bits each.
    parameters = int(model.num_parameters())
    head = model.get_output_embeddings()
    inputs: dict[nn.Module, list[torch.Tensor]] = {}

    def note_input(module: nn.Module, args: tuple[object, ...]) -> None:
        x = args[0]
        assert isinstance(x, torch.Tensor)
        inputs.setdefault(module, []).append(x)

    named = dict(model.named_modules())
    hooks = [m.register_forward_pre_hook(note_input) for m in named.values() if linear_shape(m)]
    ids = torch.arange(_PROBE_ROWS, device=next(model.parameters()).device)[None] % config.vocab_size
    sums = WatchSums(model)
    try:
        with torch.inference_mode(), sums:
            _probe(model, {"input_ids": ids})
    except (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError) as error:
        if not probed_sites(model):
            raise UnsupportedArchitecture(not_through_interface(config.model_type)) from error
        raise UnsupportedArchitecture(f"{config.model_type} can't run a packed step: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()
    attention = probed_sites(model)
    if not attention:
        raise UnsupportedArchitecture(not_through_interface(config.model_type))
    if len(attention) != config.num_hidden_layers:
        raise UnsupportedArchitecture(
            f"{config.model_type} sends {len(attention)} of {config.num_hidden_layers} layers' attention "
            "through transformers' AttentionInterface; all of them must"
        )
    with torch.inference_mode():
        if ids.device.type != "meta" and not _rows_are_apart(model, ids):
            raise UnsupportedArchitecture(
                f"{config.model_type} carries state from token to token outside attention, which would mix "
                "the requests of a step"
            )
    linears = {}
    others = {}
    same_input: dict[int, tuple[str, ...]] = {}
    for path, module in named.items():
        shape = linear_shape(module)
        rows = [x.numel() // x.shape[-1] for x in inputs.get(module, ())]
        if shape and rows == [1 if module is head else _PROBE_ROWS]:
            has_bias = getattr(module, "bias", None) is not None
            linears[path] = LinearShape(*shape, is_head=module is head, has_bias=has_bias)
            # An id stands for one tensor, since all of them are still held.
            key = id(inputs[module][0])
            same_input[key] = (*same_input.get(key, ()), path)
        elif path:
            others[path] = type(module).__name__
    return BaseSpec(
        name=name,
        architecture=config.model_type,
        linears=linears,
        same_input=tuple(same_input.values()),
        others=others,
        attention=attention,
        residual=sums.sites(),
        hidden_size=model.get_input_embeddings().weight.shape[1],
        vocabulary_size=config.vocab_size,
        parameters=parameters,
    )
