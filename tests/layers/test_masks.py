"""A layer's window is what its mask says, and a mask that says anything else is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    padding_mask_function,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)

from polygraft.errors import UnsupportedArchitecture
from polygraft.layers.attention import attention_forward
from polygraft.layers.masks import Rule, carry_rule, window_of


@pytest.mark.parametrize("window", [1, 2, 7, 4096])
@pytest.mark.parametrize("passes", [True, False])
def test_a_window_is_read_whether_or_not_the_layer_passes_it(window: int, passes: bool) -> None:
    mask = carry_rule(mask_function=sliding_window_causal_mask_function(window), local_size=window)
    assert window_of(mask, window if passes else None, "Layer") == window


def test_a_plain_causal_mask_has_no_window() -> None:
    assert window_of(carry_rule(mask_function=causal_mask_function), None, "Layer") == 0


def islands(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Sees two keys to the right as well, once it is far along."""
    return (key <= query) | ((query > 1000) & (key <= query + 2))


@pytest.mark.parametrize(
    ("rule", "size"),
    [
        (chunked_causal_mask_function(8, torch.zeros(1, dtype=torch.long)), 8),
        (bidirectional_mask_function, None),
        (sliding_window_bidirectional_mask_function(8), 8),
        (sliding_window_causal_mask_function(8), 9),
        (sliding_window_causal_mask_function(8), None),
        (causal_mask_function, 8),
        (or_masks(causal_mask_function, padding_mask_function(torch.ones(1, 3, dtype=torch.bool))), None),
        (islands, None),
    ],
    ids=[
        "chunks",
        "both-ways",
        "window-both-ways",
        "other-size",
        "no-size",
        "no-window",
        "by-batch",
        "islands",
    ],
)
def test_other_rules_are_refused(rule: Rule, size: int | None) -> None:
    with pytest.raises(UnsupportedArchitecture, match=r"Layer masks otherwise than causally within a window"):
        window_of(carry_rule(mask_function=rule, local_size=size), None, "Layer")


@pytest.mark.parametrize("mask", [None, torch.zeros(1, 1, 1, 1)])
def test_a_mask_of_its_own_is_refused(mask: torch.Tensor | None) -> None:
    with pytest.raises(UnsupportedArchitecture, match="Layer attends by a mask of its own"):
        window_of(mask, None, "Layer")


def test_a_window_beside_a_mask_without_it_is_refused() -> None:
    with pytest.raises(UnsupportedArchitecture, match="passes a window of 8 keys and masks by none"):
        window_of(carry_rule(mask_function=causal_mask_function), 8, "Layer")


def test_a_layer_that_isnt_causal_is_refused() -> None:
    layer = nn.Identity()
    layer.is_causal = False
    q = torch.zeros(1, 2, 3, 4)
    with pytest.raises(UnsupportedArchitecture, match="Identity attends in both directions"):
        attention_forward(layer, q, q, q, carry_rule(mask_function=causal_mask_function))
