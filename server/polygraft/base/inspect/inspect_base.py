"""Finds out what a base model consists of, so that adapters can be checked against it and compiled for it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from polygraft.base.inspect.experts import find_experts
from polygraft.base.inspect.modules import find_embedding, find_linears, find_norms, group_by_input
from polygraft.base.inspect.residual_sites import find_residual_sites
from polygraft.base.inspect.routers import find_routers
from polygraft.base.inspect.trace import Trace, record
from polygraft.core.spec import AttentionSite, BaseSpec
from polygraft.errors import UnsupportedArchitecture
from polygraft.layers.attention import probed_sites

_PROBE_ROWS = 11  # no likely number of heads, so that rows and heads can be told apart


def inspect_base(model: PreTrainedModel, name: str, folder: str = "") -> BaseSpec:
    """Run a few rows through a model on its device, which may be meta, and describe what it consists of.

    Raises:
        UnsupportedArchitecture: a layer doesn't reach attention through transformers' interface, sees other
            keys than those in a causal window, or mixes rows outside attention (which meta can't show).
    """
    config = model.config.get_text_config()
    # Counted before the first forward packs quantized weights; tied ones once, those of four bits each.
    parameters = int(model.num_parameters())
    table = model.get_input_embeddings()
    ids = torch.arange(_PROBE_ROWS, device=next(model.parameters()).device)[None] % config.vocab_size
    positions = torch.arange(_PROBE_ROWS, device=ids.device)[None]
    trace = _traced(model, ids, positions)
    attention = _attention(model)
    if ids.device.type != "meta" and not _keeps_rows_apart(model, ids, positions):
        raise UnsupportedArchitecture(
            f"{config.model_type} carries state from token to token outside attention, which would mix "
            "the requests of a step"
        )
    linears = find_linears(trace, model.get_output_embeddings(), _PROBE_ROWS)
    return BaseSpec(
        name=name,
        architecture=config.model_type,
        linears=linears,
        same_input=group_by_input(trace, linears),
        others={
            path: type(module).__name__
            for path, module in model.named_modules()
            if path and path not in linears
        },
        embedding=find_embedding(model, trace, positions),
        norms=find_norms(trace, _PROBE_ROWS),
        attention=attention,
        residual=find_residual_sites(trace),
        experts=find_experts(trace, _PROBE_ROWS),
        routers=find_routers(trace, _PROBE_ROWS),
        folder=folder,
        hidden_size=table.weight.shape[1],
        vocabulary_size=config.vocab_size,
        parameters=parameters,
    )


def not_through_interface(architecture: str) -> str:
    """Say why an architecture with its own attention code isn't served."""
    return f"{architecture} doesn't send its attention through transformers' AttentionInterface"


def _traced(model: PreTrainedModel, ids: torch.Tensor, positions: torch.Tensor) -> Trace:
    """Record one forward.

    Raises:
        UnsupportedArchitecture: the model can't run a packed step.
    """
    try:
        with record(model) as trace:
            _run(model, {"input_ids": ids}, positions)
    except (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError) as error:
        architecture = model.config.get_text_config().model_type
        if not probed_sites(model):
            raise UnsupportedArchitecture(not_through_interface(architecture)) from error
        raise UnsupportedArchitecture(f"{architecture} can't run a packed step: {error}") from error
    return trace


def _run(model: PreTrainedModel, rows: Mapping[str, torch.Tensor], positions: torch.Tensor) -> torch.Tensor:
    """Run the model as a packed step does.

    Args:
        rows: "input_ids" or "inputs_embeds".

    Returns:
        The last row's logits [vocabulary].
    """
    device = positions.device
    with torch.inference_mode():
        logits: torch.Tensor = model(
            **rows,
            position_ids=positions,
            # Of two dimensions, so that transformers makes each layer a mask, which tells what it sees.
            attention_mask=torch.ones(1, _PROBE_ROWS, dtype=torch.long, device=device),
            use_cache=False,
            logits_to_keep=torch.tensor([_PROBE_ROWS - 1], device=device),
        ).logits[0, -1]
    return logits


def _attention(model: PreTrainedModel) -> Mapping[str, AttentionSite]:
    """Return the attention layers that the traced forward has reached.

    Raises:
        UnsupportedArchitecture: they aren't all of the model's layers.
    """
    config, sites = model.config.get_text_config(), probed_sites(model)
    if not sites:
        raise UnsupportedArchitecture(not_through_interface(config.model_type))
    if len(sites) != config.num_hidden_layers:
        raise UnsupportedArchitecture(
            f"{config.model_type} sends {len(sites)} of {config.num_hidden_layers} layers' attention "
            "through transformers' AttentionInterface; all of them must"
        )
    return sites


def _keeps_rows_apart(model: PreTrainedModel, ids: torch.Tensor, positions: torch.Tensor) -> bool:
    """Whether the last row's logits stay finite when all rows before it are NaN.

    While a base is inspected, its attention lets no row attend to another. So NaN can only come through a
    convolution or a recurrence, which would carry one request's state into the next.
    """
    with torch.inference_mode():
        embedded = model.get_input_embeddings()(ids)
        embedded[:, :-1] = torch.nan
    return bool(_run(model, {"inputs_embeds": embedded}, positions).isfinite().all())
