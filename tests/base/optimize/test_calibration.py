"""The kernel for unquantized weights is chosen by measurement, or by necessity."""

from __future__ import annotations

import pytest
import torch

from polygraft.base.optimize import calibration
from polygraft.base.optimize.calibration import MARGIN, ONEDNN, OURS, ROWS, calibrate
from polygraft.layers.linear.linear import PackedLinear
from polygraft.layers.linear.onednn_linear import OneDnnLinear
from polygraft.layers.native.kernels import load_kernels

KERNELS = load_kernels()
NATIVE = pytest.mark.skipif(KERNELS is None, reason="no C++ compiler")
WIDE = torch.randn(512, 512)


class Clock:
    """Stands in for `time`: a product takes as long as its kernel is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ours: float, onednn: float) -> None:
        self.now = 0.0
        for module, seconds in ((PackedLinear, ours), (OneDnnLinear, onednn)):
            monkeypatch.setattr(module, "forward", self.taking(seconds))
        monkeypatch.setattr(calibration, "time", self)

    def taking(self, seconds: float) -> object:
        def forward(_: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
            self.now += seconds
            return x

        return forward

    def perf_counter(self) -> float:
        return self.now


@NATIVE
@pytest.mark.parametrize(
    ("onednn", "chosen"), [(MARGIN * 0.9, ONEDNN), (MARGIN * 1.1, OURS), (1.0, OURS), (3.0, OURS)]
)
def test_onednn_must_be_clearly_faster(monkeypatch: pytest.MonkeyPatch, onednn: float, chosen: str) -> None:
    Clock(monkeypatch, 1.0, onednn)
    found = calibrate(WIDE, KERNELS)
    assert found.kernel == chosen
    assert found.microseconds[OURS] == pytest.approx(dict.fromkeys(ROWS, 1e6))
    assert found.microseconds[ONEDNN] == pytest.approx(dict.fromkeys(ROWS, 1e6 * onednn))


@NATIVE
def test_the_products_are_really_timed() -> None:
    found = calibrate(WIDE, KERNELS)
    assert found.kernel in (OURS, ONEDNN)
    for rows in found.microseconds.values():
        assert list(rows) == list(ROWS)
        assert all(0.1 < microseconds < 1e6 for microseconds in rows.values())


@NATIVE
def test_small_weights_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "time", None)
    assert calibrate(torch.randn(64, 64), KERNELS) == calibration.Calibration(OURS, {})


def test_without_a_compiler_there_is_no_choice() -> None:
    assert calibrate(WIDE, None) == calibration.Calibration(ONEDNN, {})
