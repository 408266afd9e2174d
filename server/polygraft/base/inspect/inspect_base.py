"""What an adapter must know of the base model to be checked against it and compiled for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from polygraft.base.inspect.experts import WatchExperts
from polygraft.base.inspect.residual_sites import WatchSums
from polygraft.base.inspect.routers import WatchRouters
from polygraft.core.spec import BaseSpec, EmbeddingShape, LinearShape, NormShape
from polygraft.errors import UnsupportedArchitecture
from polygraft.layers.attention import probed_sites

_PROBE_ROWS = 11  # no likely number of heads, so that rows and heads can be told apart


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


def _probe(model: PreTrainedModel, rows: Mapping[str, torch.Tensor], positions: torch.Tensor) -> torch.Tensor:
    """Run a few rows, given as the model takes them, as a packed step would.

    Returns:
        the last row's logits [vocabulary].
    """
    device = positions.device
    logits: torch.Tensor = model(
        **rows,
        position_ids=positions,
        # Of two dimensions, so that each layer gets a mask made, which tells whom it sees.
        attention_mask=torch.ones(1, _PROBE_ROWS, dtype=torch.long, device=device),
        use_cache=False,
        logits_to_keep=torch.tensor([_PROBE_ROWS - 1], device=device),
    ).logits[0, -1]
    return logits


def _rows_are_apart(model: PreTrainedModel, ids: torch.Tensor, positions: torch.Tensor) -> bool:
    """Whether the last row stays finite behind rows that aren't numbers.

    `Probe` lets no row attend to another, so what reaches it comes by another way: a convolution or a
    recurrence, which would carry one request's state into the next.
    """
    embedded = model.get_input_embeddings()(ids)
    embedded[:, :-1] = torch.nan
    return bool(_probe(model, {"inputs_embeds": embedded}, positions).isfinite().all())


def inspect_base(model: PreTrainedModel, name: str, folder: str = "") -> BaseSpec:
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
    watched = (m for m in named.values() if linear_shape(m) or _is_norm(m) or isinstance(m, nn.Embedding))
    hooks = [module.register_forward_pre_hook(note_input) for module in watched]
    ids = torch.arange(_PROBE_ROWS, device=next(model.parameters()).device)[None] % config.vocab_size
    positions = torch.arange(_PROBE_ROWS, device=ids.device)[None]
    sums, experts, routers = WatchSums(model), WatchExperts(model), WatchRouters(model)
    try:
        with torch.inference_mode(), sums, experts, routers:
            _probe(model, {"input_ids": ids}, positions)
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
        if ids.device.type != "meta" and not _rows_are_apart(model, ids, positions):
            raise UnsupportedArchitecture(
                f"{config.model_type} carries state from token to token outside attention, which would mix "
                "the requests of a step"
            )
    linears = {}
    others = {}
    norms: dict[str, NormShape] = {}
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
            axis = _row_axis(inputs.get(module, ())) if _is_norm(module) else None
            if axis is not None:
                width, has_bias = len(module.weight), getattr(module, "bias", None) is not None
                norms[path] = NormShape(width, has_bias, axis)
    return BaseSpec(
        name=name,
        architecture=config.model_type,
        linears=linears,
        same_input=tuple(same_input.values()),
        others=others,
        embedding=_embedding(model, inputs, positions),
        norms=norms,
        attention=attention,
        residual=sums.sites(),
        experts=experts.found(_PROBE_ROWS),
        routers=routers.found(_PROBE_ROWS),
        folder=folder,
        hidden_size=model.get_input_embeddings().weight.shape[1],
        vocabulary_size=config.vocab_size,
        parameters=parameters,
    )


def _is_norm(module: nn.Module) -> bool:
    """Whether it multiplies by a vector, and adds one at most, and has nothing else."""
    parameters = dict(module.named_parameters())
    return (
        type(module).__name__.endswith("Norm")
        and "weight" in parameters
        and parameters.keys() <= {"weight", "bias"}
        and all(parameter.dim() == 1 for parameter in parameters.values())
    )


def _row_axis(inputs: Sequence[torch.Tensor]) -> int | None:
    """Where a norm that has seen the probe's rows once has them: [1, rows, ...] or [1, heads, rows, ...]."""
    shape = inputs[0].shape if len(inputs) == 1 else torch.Size()
    axes = [axis for axis in range(1, len(shape) - 1) if shape[axis] == _PROBE_ROWS]
    return axes[0] if len(axes) == 1 and shape[0] == 1 else None


def _embedding(
    model: PreTrainedModel, inputs: Mapping[nn.Module, list[torch.Tensor]], positions: torch.Tensor
) -> EmbeddingShape | None:
    table = model.get_input_embeddings()
    name = next((name for name, module in model.named_modules() if module is table), None)
    if not isinstance(table, nn.Embedding) or name is None or len(inputs.get(table, ())) != 1:
        return None
    head = model.get_output_embeddings()
    rows = table.num_embeddings
    # An id may reach a table of its own after arithmetic, so whatever is as large as a vocabulary and isn't
    # read by positions counts.
    by_position = positions.untyped_storage()._cdata
    others = (
        module
        for module, read in inputs.items()
        if isinstance(module, nn.Embedding)
        and module is not table
        and 2 * module.num_embeddings >= rows
        and any(x.untyped_storage()._cdata != by_position for x in read)
    )
    return EmbeddingShape(
        name,
        rows,
        tied=head is not None and head.weight is table.weight,
        resizable=table.max_norm is None and not any(True for _ in others),
    )
