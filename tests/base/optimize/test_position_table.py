"""A table of rotary positions gives what the module gives, and calls it seldom."""

from __future__ import annotations

import torch
from torch import nn

from polygraft.base.optimize.position_table import PositionTable


class Rotary(nn.Module):
    """Counts its calls; positions are all that goes in."""

    calls = 0

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls += 1
        angles = position_ids[..., None] * torch.arange(1, 5)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def test_a_position_table_gives_what_the_module_gives() -> None:
    rotary = Rotary()
    table = PositionTable(rotary, 3000)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.zeros(1, 3, 8, dtype=dtype)
        for positions in ([0, 5, 5], [1023], [1024, 7], [2999, 0], [3000, 1]):
            at = torch.tensor([positions])
            for mine, theirs in zip(table(x, at), Rotary()(x, at), strict=True):
                assert mine.dtype is dtype
                assert torch.equal(mine, theirs)
                assert mine.is_contiguous()
    # Filled twice for each type, as the positions grow, and asked itself behind the last that is kept.
    assert rotary.calls == 8


def test_a_position_table_never_asks_behind_the_context() -> None:
    class Short(Rotary):
        def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            assert position_ids.max() < 1500
            return super().forward(x, position_ids)

    PositionTable(Short(), 1500)(torch.zeros(1), torch.tensor([[1100]]))
