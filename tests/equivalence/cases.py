"""One base in one precision with a row for each adapter: our engine's answers beside PEFT's."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig

from polygraft.engine.engine import Engine
from tests.engines import forced_logits, greedy, make_engine, run_greedy
from tests.equivalence.reference import Reference, forced, generate, load_reference
from tests.peft_folders import save_adapter
from tests.tiny import save_random_model

BASE = "base"
TOLERANCE = 1e-4  # on logits of size 5, in float32
ALLOWANCE = 1.5


def adapter_of(row: str) -> str | None:
    """The adapter's name in a request."""
    return None if row == BASE else row


@dataclass(frozen=True)
class Case:
    """Rows, their prompts, and PEFT's answers.

    Args:
        prompts: by row.
        exact: in float32.
        peers: a row's logits along `exact`'s tokens [steps, vocabulary], in this precision.
    """

    engine: Engine
    prompts: Mapping[str, list[int]]
    exact: Mapping[str, Reference]
    peers: Callable[[str], torch.Tensor]

    @property
    def steps(self) -> int:
        """Tokens that each row is asked for."""
        return len(next(iter(self.exact.values())).tokens)

    def step_of(self, row: str, at: int) -> tuple[list[int], str | None]:
        """The row's prompt and so many of its tokens as a step finds, with its adapter."""
        return self.prompts[row] + self.exact[row].tokens[:at], adapter_of(row)

    def _steps_of(self, row: str) -> list[tuple[list[int], str | None]]:
        return [self.step_of(row, at) for at in range(self.steps)]

    @functools.cached_property
    def mixed_tokens(self) -> dict[str, list[int]]:
        """Each row's tokens, all rows together."""
        requests = [greedy(row, prompt, adapter_of(row), self.steps) for row, prompt in self.prompts.items()]
        return dict(zip(self.prompts, run_greedy(self.engine, requests), strict=True))

    @functools.cached_property
    def mixed_logits(self) -> dict[str, torch.Tensor]:
        """Each row's logits [steps, vocabulary], all rows and steps together."""
        logits = forced_logits(self.engine, [step for row in self.prompts for step in self._steps_of(row)])
        return dict(zip(self.prompts, logits.view(len(self.prompts), self.steps, -1), strict=True))

    def solo_tokens(self, row: str) -> list[int]:
        """A row's tokens, asked for alone."""
        (tokens,) = run_greedy(self.engine, [greedy("solo", self.prompts[row], adapter_of(row), self.steps)])
        return tokens

    def solo_logits(self, row: str) -> torch.Tensor:
        """A row's logits [steps, vocabulary], each step alone."""
        return torch.cat([forced_logits(self.engine, [step]) for step in self._steps_of(row)])


class Answers:
    """PEFT's own for the rows of one base, each computed once.

    Args:
        store: a folder for each row but the base's.
    """

    def __init__(self, model: Path, store: Path, prompts: Mapping[str, list[int]], steps: int) -> None:
        self.model, self.store, self.prompts, self.steps = model, store, prompts, steps

    def load(self, row: str, precision: str) -> torch.nn.Module:
        """The model with a row's adapter."""
        return load_reference(self.model, None if row == BASE else self.store / row, precision)

    @functools.cached_property
    def exact(self) -> dict[str, Reference]:
        """In float32."""
        return {
            row: generate(self.load(row, "float32"), prompt, self.steps)
            for row, prompt in self.prompts.items()
        }

    def peers(self, precision: str) -> Callable[[str], torch.Tensor]:
        """A row's logits [steps, vocabulary] along the exact tokens in another precision; computed when they are
        asked for, since a part of the tests runs a part of the rows."""

        @functools.cache
        def of(row: str) -> torch.Tensor:
            return forced(self.load(row, precision), self.prompts[row], self.exact[row].tokens)

        return of


def random_answers(
    folder: Path,
    architecture: str,
    config: Mapping[str, Any],
    adapters: Mapping[str, PeftConfig],
    prompts: Mapping[str, list[int]],
    steps: int,
) -> Answers:
    """Of a random model, made in the folder with a random adapter for each row but the base's.

    Args:
        adapters: by row.
    """
    model = save_random_model(folder / "model", architecture, config, vectors=True)
    for seed, (row, one) in enumerate(adapters.items()):
        save_adapter(folder / "store" / row, model, architecture, one, seed)
    return Answers(model, folder / "store", prompts, steps)


def make_case(answers: Answers, precision: str) -> Case:
    """Serve the rows beside PEFT's answers to them."""
    engine = make_engine(answers.model, answers.store, precision=precision)
    assert [i.problems for i in engine.adapters.registry.list() if i.problems] == []
    return Case(engine, answers.prompts, answers.exact, answers.peers(precision))


def check_exact(case: Case, row: str) -> None:
    """The same greedy tokens and logits, alone and with all rows in a batch."""
    expected = case.exact[row]
    assert case.solo_tokens(row) == expected.tokens
    assert case.mixed_tokens[row] == expected.tokens
    assert (case.mixed_logits[row] - expected.logits).abs().max() < TOLERANCE
    assert (case.solo_logits(row) - expected.logits).abs().max() < TOLERANCE


def check_as_near_as_peft(case: Case, row: str) -> None:
    """Along the exact tokens, an error of at most 1.5 times PEFT's own; another greedy token only where the
    exact two likeliest are closer than twice that error."""
    exact = case.exact[row].logits
    theirs = case.peers(row) - exact
    gaps = exact.topk(2).values.diff(dim=-1).abs().squeeze(-1)
    for ours in (case.mixed_logits[row], case.solo_logits(row)):
        assert rms(ours - exact) <= ALLOWANCE * rms(theirs)
        differs = ours.argmax(-1) != exact.argmax(-1)
        assert (gaps[differs] < 2 * theirs.abs().amax(-1)[differs]).all()


def check_rows_differ(case: Case) -> None:
    """Behind the shortest prompt, each row's logits differ from every other's, so that no row can pass for another."""
    same = min(case.prompts.values(), key=len)
    logits = forced_logits(case.engine, [(same, adapter_of(row)) for row in case.prompts])
    distance = (logits[:, None] - logits[None]).abs().amax(-1)
    distance.fill_diagonal_(torch.inf)
    assert distance.min() > 10 * TOLERANCE


def rms(x: torch.Tensor) -> float:
    """Root of the mean square."""
    return float(x.square().mean().sqrt())
