"""Runs a model without its own code, where that only calls embedding, positions, layers, norm and head.

Transformers' code between two operators builds masks and outputs that nobody reads. It is slow there, since
streaming the weights has just evicted the interpreter's working set from the CPU caches. A model is
recognised by the tensors that its modules pass to each other in a recorded forward.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from polygraft.base.context_limit import context_limit
from polygraft.base.inspect.trace import Call, Trace, record
from polygraft.base.optimize.position_table import PositionTable
from polygraft.base.optimize.trial_step import trial_rows, trial_step
from polygraft.layers.decoder_layer import FusedDecoderLayer, FusedLayers
from polygraft.layers.native.kernels import Kernels
from polygraft.layers.step import StepContext


@dataclass(frozen=True, slots=True)
class FusedModel:
    """A model whose layers are computed in one call.

    Args:
        modules: the layers' modules and their fused forwards, in the model's order.
        hooks: the tables of the modules' hooks that would run between two layers or after the last.
        layers: the same layers in one call.
    """

    embedding: nn.Module
    rotary: PositionTable
    modules: Mapping[nn.Module, FusedDecoderLayer]
    hooks: Sequence[Mapping[int, object]]
    layers: FusedLayers
    norm: nn.Module
    head: nn.Module

    def __call__(
        self,
        position_ids: torch.Tensor,
        kept: torch.Tensor | None,
        *,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """Compute the logits of the kept rows.

        Args:
            position_ids: int64 [1, rows].
            kept: int64 [n]; None keeps all.
            input_ids: int64 [1, rows], or None if there are embeddings.
            inputs_embeds: [1, rows, hidden].

        Returns:
            [n, tokens]; None if the model itself must be called.
        """
        if self._layers_have_changed():
            return None
        x = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        out = self.layers(self._before_layers(x), self.rotary(x, position_ids))
        if out is None:
            return None
        normed = self.norm(out)
        logits: torch.Tensor = self.head(normed if kept is None else normed[:, kept])[0]
        return logits

    def _layers_have_changed(self) -> bool:
        """Whether someone has replaced a layer's forward or put a hook between two layers."""
        return any(self.hooks) or any(
            vars(module).get("forward") is not layer for module, layer in self.modules.items()
        )

    def _before_layers(self, x: torch.Tensor) -> torch.Tensor:
        """Run the hooks before the first layer: invertible adapters have theirs there."""
        first = next(iter(self.modules))
        for hook in first._forward_pre_hooks.values():
            changed = hook(first, (x,))
            if changed is not None:
                x = changed[0] if isinstance(changed, tuple) else changed
        return x


def find_fused_model(
    model: PreTrainedModel,
    fused: Mapping[nn.Module, FusedDecoderLayer],
    step: StepContext,
    kernels: Kernels,
) -> FusedModel | None:
    """Return the model with all layers in one call; None unless that gives the same logits, to the bit.

    Args:
        fused: the layers that are fused one by one, by module.
    """
    trial = _Trial(model, next(iter(fused.values())).attention.key_cache, step)
    try:
        with record(model) as trace:
            expected = trial.run_model(model)
        found = _recognise(model, trace, fused, trial.positions, step, kernels)
        if found is None:
            return None
        logits = trial.run_fused(found)
    except (RuntimeError, TypeError, ValueError):
        return None
    return found if logits is not None and torch.equal(logits, expected) else None


class _Trial:
    """The same few rows for a model and its fused form.

    Args:
        key_cache: of any of the model's layers.
    """

    def __init__(self, model: PreTrainedModel, key_cache: torch.Tensor, step: StepContext) -> None:
        self._cache = key_cache
        self._step = step
        rows = trial_rows(key_cache)
        generator = torch.Generator().manual_seed(0)
        vocabulary = model.config.get_text_config().vocab_size
        self._ids = torch.randint(vocabulary, (1, rows), generator=generator)
        self._kept = torch.arange(1, rows)
        self.positions = torch.arange(rows)[None]

    def run_model(self, model: PreTrainedModel) -> torch.Tensor:
        """Return the logits [rows - 1, vocabulary] of all rows but the first."""
        with trial_step(self._step, self._cache):
            logits: torch.Tensor = model(
                input_ids=self._ids,
                position_ids=self.positions,
                attention_mask=torch.zeros(1, 1, 1, 1),
                use_cache=False,
                logits_to_keep=self._kept,
            ).logits[0]
            return logits

    def run_fused(self, model: FusedModel) -> torch.Tensor | None:
        """Return the same of a fused model, or None if it doesn't compute them."""
        with trial_step(self._step, self._cache):
            return model(self.positions, self._kept, input_ids=self._ids)


def _recognise(
    model: PreTrainedModel,
    trace: Trace,
    fused: Mapping[nn.Module, FusedDecoderLayer],
    position_ids: torch.Tensor,
    step: StepContext,
    kernels: Kernels,
) -> FusedModel | None:
    """Find the parts of a fused model in a recorded forward.

    Args:
        position_ids: the traced forward's.
    """
    layers = [call for call in trace.calls if call.module in fused]
    if not _form_a_chain(layers, fused):
        return None
    x, positions = layers[0].args[0], layers[0].kwargs["position_embeddings"]
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    rotary = _rotary(trace, positions, x, position_ids)
    norm = _reader(trace, layers[-1].out)
    logits = trace.calls[-1].out.logits  # the outermost call is the model's own
    if rotary is None or norm is None or not _gave(trace, embedding, x) or not _gave(trace, head, logits):
        return None
    modules = {call.module: fused[call.module] for call in layers}
    first, *others = modules
    return FusedModel(
        embedding=embedding,
        rotary=PositionTable(rotary, context_limit(model.config)[0]),
        modules=modules,
        hooks=[
            first._forward_pre_hooks_with_kwargs,  # the first layer's other pre-hooks are called
            *(module._forward_pre_hooks for module in others),
            *(module._forward_hooks for module in modules),
        ],
        layers=FusedLayers(list(modules.values()), step, kernels),
        norm=norm,
        head=head,
    )


def _rotary(trace: Trace, positions: object, x: torch.Tensor, position_ids: torch.Tensor) -> nn.Module | None:
    """Return the module that made the layers' positions of nothing but x and the position ids."""
    for call in reversed(trace.calls):
        given = (*call.args, *call.kwargs.values())
        if call.out is positions and len(given) == 2 and given[0] is x and given[1] is position_ids:
            return call.module
    return None


def _reader(trace: Trace, x: torch.Tensor) -> nn.Module | None:
    """Return the module that was called with x alone; of a wrapper and what it wraps, the wrapper."""
    # A wrapper's call returns after the call of the module that it wraps.
    calls = (call for call in reversed(trace.calls) if len(call.args) == 1 and call.args[0] is x)
    return next((call.module for call in calls), None)


def _gave(trace: Trace, module: nn.Module, out: torch.Tensor) -> bool:
    """Whether a module's last call returned this object."""
    return any(call.out is out for call in trace.calls_of(module)[-1:])


def _form_a_chain(calls: Sequence[Call], fused: Mapping[nn.Module, FusedDecoderLayer]) -> bool:
    """Whether each layer is called once, with the output of the layer before it and the same positions, and
    all have the same shape and type."""
    if {call.module for call in calls} != fused.keys() or len(calls) != len(fused):
        return False
    shapes = {(layer.hidden_size, layer.head_dim, layer.dtype) for layer in fused.values()}
    positions = [call.kwargs.get("position_embeddings") for call in calls]
    return (
        len(shapes) == 1
        and positions[0] is not None
        and all(other is positions[0] for other in positions)
        and all(len(call.args) == 1 for call in calls)
        and all(call.args[0] is before.out for before, call in itertools.pairwise(calls))
    )
