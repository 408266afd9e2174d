"""What a model calls around its layers, called without the model's own code.

Between two operators transformers' code takes longer than one would think: it makes masks and outputs that
nobody reads, and runs with the weights that have just gone by in the processor's cache, in the interpreter's
place. A model is recognised by what its modules hand each other, object by object, while a few rows run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from polygraft.base.context_limit import context_limit
from polygraft.layers.decoder_layer import FusedDecoderLayer
from polygraft.layers.step import StepContext


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One call of a module; what it was given and gave is held, so that each object stays itself."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any

    @property
    def positions(self) -> object:
        """Rotary positions, of a decoder layer."""
        return self.kwargs.get("position_embeddings")


@contextmanager
def watch_calls(model: nn.Module) -> Iterator[list[Call]]:
    """Notes the calls of all modules; those within another's come before it."""
    calls: list[Call] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        calls.append(Call(module, args, kwargs, out))

    hooks = [module.register_forward_hook(note, with_kwargs=True) for module in model.modules()]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


_MOST_POSITIONS = 2**16
"""That are kept: 32 MB at a head of 128 in bfloat16."""


class PositionTable:
    """What a rotary module gives, kept by position and looked up: a step calls for little else than that.

    Args:
        rotary: gives (cos, sin), each [1, rows, head_dim], for x of any type and int64 positions [1, rows].
        context_length: up to here it gives each row's by its position alone, whatever the longest is.
    """

    def __init__(self, rotary: nn.Module, context_length: int) -> None:
        self._rotary = rotary
        self._most = min(context_length, _MOST_POSITIONS)
        self._cos = self._sin = torch.empty(0)

    def __call__(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As the module's."""
        last = int(position_ids.max())
        if last >= self._most or self._rotary._forward_hooks or self._rotary._forward_pre_hooks:
            found: tuple[torch.Tensor, torch.Tensor] = self._rotary(x, position_ids)
            return found
        if last >= len(self._cos) or self._cos.dtype is not x.dtype:
            self._fill(x, last)
        at = position_ids[0]
        return self._cos.index_select(0, at)[None], self._sin.index_select(0, at)[None]

    def _fill(self, x: torch.Tensor, last: int) -> None:
        every = torch.arange(min(self._most, 1 << max(10, last.bit_length())), device=x.device)
        cos, sin = self._rotary(x, every[None])
        self._cos, self._sin = cos[0], sin[0]


@dataclass(frozen=True, slots=True)
class ModelFrame:
    """A model whose layers are all computed by the first: embedding, positions, layers, norm and head.

    Args:
        layers: the first layer's forward.
    """

    embedding: nn.Module
    rotary: PositionTable
    first_layer: nn.Module
    layers: FusedDecoderLayer
    norm: nn.Module
    head: nn.Module
    step: StepContext

    def __call__(
        self,
        position_ids: torch.Tensor,
        kept: torch.Tensor | None,
        *,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """Logits of the rows that are kept.

        Args:
            position_ids: int64 [1, rows].
            kept: int64 [n]; None keeps all.
            input_ids: int64 [1, rows], or None if there are embeddings.
            inputs_embeds: [1, rows, hidden].

        Returns:
            [n, tokens], or None if the layers aren't computed together: then the model itself is to be asked.
        """
        if not self.layers.together:
            return None
        x = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        x = self.first_layer(x, position_embeddings=self.rotary(x, position_ids))
        computed, self.step.following = self.step.following is not None and x is self.step.stream, None
        if not computed:
            return None
        x = self.norm(x)
        logits: torch.Tensor = self.head(x if kept is None else x[:, kept])[0]
        return logits


def find_frame(
    model: PreTrainedModel,
    calls: Sequence[Call],
    layers: Sequence[Call],
    first: FusedDecoderLayer,
    position_ids: torch.Tensor,
    step: StepContext,
) -> ModelFrame | None:
    """The frame around layers that are all computed together; the caller tries whether it gives the same.

    Args:
        calls: all that the model has made, its own last.
        layers: those of the layers.
        first: the forward of the first of them.
        position_ids: what it was given.
    """
    x = layers[0].args[0]
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    by_module = {call.module: call for call in calls}
    # Of a module and the one that it wraps both are seen, and the last is the outer one.
    norms = [call.module for call in calls if len(call.args) == 1 and call.args[0] is layers[-1].out]
    rotaries = [
        call.module
        for call in calls
        if call.out is layers[0].positions and _same((*call.args, *call.kwargs.values()), (x, position_ids))
    ]
    if (
        not norms
        or not rotaries
        or embedding not in by_module
        or by_module[embedding].out is not x
        or head not in by_module
        or by_module[head].out is not calls[-1].out.logits
    ):
        return None
    rotary = PositionTable(rotaries[-1], context_limit(model.config)[0])
    return ModelFrame(embedding, rotary, layers[0].module, first, norms[-1], head, step)


def _same(mine: Sequence[object], theirs: Sequence[object]) -> bool:
    return len(mine) == len(theirs) and all(a is b for a, b in zip(mine, theirs, strict=True))
