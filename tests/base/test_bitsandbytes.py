"""What is asked of bitsandbytes."""

from __future__ import annotations

import pytest
from torch import nn

from polygraft.base.bitsandbytes import leave_unpacked


@pytest.mark.parametrize(
    ("inputs", "outputs", "packs"), [(64, 32, True), (96, 32, False), (64, 40, False), (128, 96, True)]
)
def test_only_shapes_that_its_packed_form_holds_are_packed(inputs: int, outputs: int, packs: bool) -> None:
    module = nn.Linear(inputs, outputs)
    # As its own modules have it on a CPU with products of bfloat16.
    module.support_avx512bf16_for_cpu = True  # type: ignore[assignment]
    leave_unpacked(nn.Sequential(module, nn.Linear(3, 3)))
    assert module.support_avx512bf16_for_cpu is packs
