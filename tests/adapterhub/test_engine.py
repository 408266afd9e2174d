"""The engine gives the logits of AdapterHub's own library, for all its folders in the same steps."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from polygraft.engine.engine import Engine
from tests.adapterhub.library import (
    ARCHITECTURES,
    FIXTURES,
    PROMPT,
    ROWS,
    base_folder,
    bfloat16_errors,
    expected,
    keys,
)
from tests.engines import forced_logits, greedy, make_engine, run_greedy
from tests.tiny import byte_tokenizer

TOLERANCE = 1e-4
ALLOWANCE = 1.5
STEPS = 5


def name_of(key: str) -> str:
    """An adapter's name, which can't have every character of its folder's."""
    return key.replace("+", "p")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """An architecture's base, with a tokenizer, and a store of its adapters."""

    @functools.cache
    def get(architecture: str) -> Path:
        folder: Path = tmp_path_factory.mktemp(architecture)
        shutil.copytree(base_folder(architecture), folder / f"tiny-{architecture}")
        byte_tokenizer().save_pretrained(folder / f"tiny-{architecture}")
        for key in keys(architecture):
            shutil.copytree(FIXTURES / architecture / key, folder / "store" / name_of(key))
        return folder

    return get


@pytest.fixture(scope="module")
def engines(folders: Callable[[str], Path]) -> Callable[..., Engine]:
    """An engine with all of an architecture's adapters."""

    @functools.cache
    def get(architecture: str, precision: str = "float32", native: bool = True) -> Engine:
        folder = folders(architecture)
        engine = make_engine(
            folder / f"tiny-{architecture}", folder / "store", precision=precision, native=native
        )
        infos = engine.adapters.registry.list()
        assert [info.name for info in infos] == sorted(map(name_of, keys(architecture)))
        assert [(info.name, info.problems) for info in infos if info.problems] == []
        assert [(info.name, info.warnings) for info in infos if info.warnings] == []
        return engine

    return get


def mixed_logits(engine: Engine, architecture: str) -> dict[str, torch.Tensor]:
    """[prompt, vocabulary] of every adapter and of the base, all in the same steps."""
    rows, lengths = ["base", *keys(architecture)], range(1, len(PROMPT) + 1)
    requests = [(PROMPT[:n], None if key == "base" else name_of(key)) for key in rows for n in lengths]
    return dict(zip(rows, forced_logits(engine, requests).view(len(rows), len(lengths), -1), strict=True))


@pytest.mark.parametrize("native", [True, False], ids=["native", "torch"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_in_a_mixed_batch_are_the_librarys(
    engines: Callable[..., Engine], architecture: str, native: bool
) -> None:
    ours = mixed_logits(engines(architecture, native=native), architecture)
    theirs = expected(architecture)
    distances = {key: float((ours[key][ROWS] - theirs[key]).abs().max()) for key in theirs}
    assert {key: distance for key, distance in distances.items() if distance > TOLERANCE} == {}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_alone_it_is_the_same(engines: Callable[..., Engine], architecture: str) -> None:
    engine = engines(architecture)
    for key in keys(architecture):
        alone = [forced_logits(engine, [(PROMPT[: at + 1], name_of(key))]) for at in ROWS]
        torch.testing.assert_close(torch.cat(alone), expected(architecture)[key], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bfloat16_is_as_near_as_the_library(engines: Callable[..., Engine], architecture: str) -> None:
    ours = mixed_logits(engines(architecture, "bfloat16"), architecture)
    exact = mixed_logits(engines(architecture), architecture)  # the library's, as is tested above
    errors = bfloat16_errors(architecture)
    ratios = {key: rms(ours[key] - exact[key]) / errors[key] for key in keys(architecture)}
    assert {key: ratio for key, ratio in ratios.items() if ratio > ALLOWANCE} == {}


def rms(x: torch.Tensor) -> float:
    return float(x.square().mean().sqrt())


@pytest.mark.parametrize("native", [True, False], ids=["native", "torch"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_decoding_gives_what_a_prefill_of_the_same_tokens_does(
    engines: Callable[..., Engine], architecture: str, native: bool
) -> None:
    engine = engines(architecture, native=native)
    requests = [greedy(key, PROMPT, name_of(key), STEPS) for key in keys(architecture)]
    for key, tokens in zip(keys(architecture), run_greedy(engine, requests), strict=True):
        logits = forced_logits(engine, [(PROMPT + tokens[:k], name_of(key)) for k in range(STEPS)])
        assert logits.argmax(-1).tolist() == tokens


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_adapter_differs_from_the_base_and_from_every_other(architecture: str) -> None:
    theirs = torch.stack(list(expected(architecture).values()))
    distance = (theirs[:, None] - theirs[None]).abs().amax((-1, -2))
    distance.fill_diagonal_(torch.inf)
    assert distance.min() > 10 * TOLERANCE
