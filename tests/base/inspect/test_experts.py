"""Which modules of an architecture hold experts, and which choose among them."""

from __future__ import annotations

from pathlib import Path

import pytest

from polygraft.base.loader import inspect_without_weights, load_base
from polygraft.core.spec import ExpertsShape, RouterShape
from tests.architectures import MATRIX, SMOKE
from tests.tiny import save_random_model

ALL = {**MATRIX, **SMOKE}


def shape(inputs: int, middle: int, *, transposed: bool = False) -> ExpertsShape:
    return ExpertsShape(4, {"gate_up_proj": (inputs, 2 * middle), "down_proj": (middle, inputs)}, transposed)


# Layers with experts, their names, their shapes, and the router's name.
FOUND = {
    "mixtral": ([0, 1], "mlp.experts", shape(64, 128), "mlp.gate"),
    "qwen3_moe": ([0], "mlp.experts", shape(64, 48), "mlp.gate"),
    "gpt_oss": ([0, 1], "mlp.experts", shape(64, 128, transposed=True), "mlp.router"),
    "qwen2_moe": ([0, 1], "mlp.experts", shape(64, 48), "mlp.gate"),
    "olmoe": ([0, 1], "mlp.experts", shape(64, 128), "mlp.gate"),
    "deepseek_v3": ([1], "mlp.experts", shape(64, 32), "mlp.gate"),
    "mistral": ([], "", None, ""),
}


@pytest.mark.parametrize("architecture", FOUND)
def test_they_are_found_with_weights_and_without(tmp_path: Path, architecture: str) -> None:
    layers, experts, expected, router = FOUND[architecture]
    folder = str(save_random_model(tmp_path, architecture, dict(ALL[architecture].config), vectors=True))
    specs = [load_base(folder, dtype=dtype).spec for dtype in ("float32", "bfloat16", "float16")]
    for spec in (*specs, inspect_without_weights(folder)):
        assert dict(spec.experts) == {f"model.layers.{layer}.{experts}": expected for layer in layers}
        assert dict(spec.routers) == {
            f"model.layers.{layer}.{router}": RouterShape(64, 4) for layer in layers
        }


def test_the_order_of_a_modules_parameters_is_kept(tmp_path: Path) -> None:
    """In PEFT's files it decides which one lies deeper."""
    folder = str(save_random_model(tmp_path, "gpt_oss", dict(MATRIX["gpt_oss"].config)))
    (one, _) = inspect_without_weights(folder).experts.values()
    assert list(one.weights) == ["gate_up_proj", "down_proj"]
