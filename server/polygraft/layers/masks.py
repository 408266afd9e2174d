"""Which keys a layer's queries see, read from the mask that transformers makes for it.

The paged attention takes a window and nothing else, and no mask reaches it. Most layers pass their window
beside the mask, but some only mask (Qwen2-MoE), and others mask in chunks or in both directions. So a base is
inspected with masks that carry the rule that transformers would fill them by, and a rule that isn't a window
is refused.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from polygraft.errors import UnsupportedArchitecture

_RULE, _SIZE = "polygraft_rule", "polygraft_size"
Rule = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Whether a query sees a key, by indices of sequence, head, query and key: transformers' mask_function."""
_FAR = 2**20
"""Behind any window: contexts this long don't occur."""


def carry_rule(
    *args: object, mask_function: Rule | None = None, local_size: int | None = None, **kwargs: object
) -> torch.Tensor:
    """A mask of no use but to carry its rule to the layers; what transformers calls to make one."""
    device = kwargs.get("device")
    mask = torch.zeros(1, 1, 1, 1, device=device if isinstance(device, torch.device) else None)
    setattr(mask, _RULE, mask_function)
    setattr(mask, _SIZE, local_size)
    return mask


def window_of(mask: torch.Tensor | None, passed: int | None, who: str) -> int:
    """The window of a layer whose mask carries its rule, 0 being none.

    Args:
        passed: what the layer passes as its window.
        who: the layer's class, for the message.

    Raises:
        UnsupportedArchitecture: the mask isn't transformers' own, its rule isn't causal within a window, or
            it contradicts what is passed.
    """
    rule: Rule | None = getattr(mask, _RULE, None)
    if rule is None:
        raise UnsupportedArchitecture(f"{who} attends by a mask of its own, which a packed step has none of")
    window = int(getattr(mask, _SIZE, None) or 0)
    if not _is_window(rule, window):
        raise UnsupportedArchitecture(
            f"{who} masks otherwise than causally within a window, which isn't served"
        )
    if passed and passed != window:
        raise UnsupportedArchitecture(
            f"{who} passes a window of {passed} keys and masks by {window or 'none'}: what holds depends on "
            "the implementation of attention"
        )
    return window


def _is_window(rule: Rule, window: int) -> bool:
    """Whether a rule is causal, and within the window unless that is 0: tried where it could differ."""
    near = {0, 1, 2, 3, 5}
    edges = {at * window + off for at in (1, 2, 3) for off in (-1, 0, 1)} if window else set()
    indices = torch.tensor(sorted({*near, *edges, _FAR - 1, _FAR}))
    query, key = indices[:, None], indices[None]
    expected = key <= query
    if window:
        expected = expected & (key > query - window)
    zero = torch.tensor(0)
    try:
        return torch.equal(rule(zero, zero, query, key).expand_as(expected), expected)
    except (RuntimeError, IndexError, TypeError, NotImplementedError):
        return False  # it looks up what only a real batch has
