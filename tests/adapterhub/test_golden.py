"""Compiled primitives give the logits of AdapterHub's own library, for every folder that it saved."""

from __future__ import annotations

import functools

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from polygraft.base.loader import inspect_without_weights
from polygraft.core.spec import BaseSpec
from tests.adapterhub.library import ARCHITECTURES, CASES, FIXTURES, PROMPT, ROWS, base_folder, expected
from tests.adapterhub.reference import ATTENTION, adapted
from tests.adapters.specimen import compile_folder

TOLERANCE = 1e-4


@functools.cache
def model_and_spec(architecture: str) -> tuple[PreTrainedModel, BaseSpec]:
    folder = base_folder(architecture)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=ATTENTION)
    return model.eval(), inspect_without_weights(str(folder))


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([PROMPT]), use_cache=False).logits[0, ROWS]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_base_is_the_same_model(architecture: str) -> None:
    model, _ = model_and_spec(architecture)
    torch.testing.assert_close(logits(model), expected(architecture)["base"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("architecture", "key"), CASES)
def test_logits_are_the_librarys(architecture: str, key: str) -> None:
    model, base = model_and_spec(architecture)
    compiled = compile_folder(FIXTURES / architecture / key, base)
    with adapted(model, base, compiled):
        ours = logits(model)
    theirs = expected(architecture)[key]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)
    assert (theirs - expected(architecture)["base"]).abs().max() > 100 * TOLERANCE
