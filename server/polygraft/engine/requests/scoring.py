"""Log-likelihoods of given continuations: each is a sequence in the same steps as everything else."""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as Tokens
from typing import TYPE_CHECKING

import torch

from polygraft.core.clock import Clock
from polygraft.core.output import RequestOutput
from polygraft.engine.sampling.logprobs import TokenTexts, likelihoods
from polygraft.engine.schedule.paths import Paths
from polygraft.engine.schedule.scheduler import Scheduler
from polygraft.engine.sequences.sequence import NEVER, Sequence, StepEnd
from polygraft.errors import PolygraftError
from polygraft_types.answers import ContinuationScore, Finished, FinishReason, Timings, TokenLogprob, Usage
from polygraft_types.requests import LoraPath, ScoreRequest

if TYPE_CHECKING:
    from polygraft.adapters.stack import Stack


class ScoreSequence(Sequence):
    """A prompt with one continuation, whose last token predicts nothing and isn't run.

    Its blocks before the first logits that are wanted may come from the prefix cache.

    Args:
        context: the prompt's tokens, at least one.
        continuation: the tokens to score, at least one.
    """

    cacheable = True

    def __init__(self, job: ScoreJob, index: int, context: Tokens[int], continuation: Tokens[int]) -> None:
        super().__init__(f"{job.id}/{index}", [*context, *continuation[:-1]], job.stack)
        if job.request.lora_path is LoraPath.MERGED:
            self.path = LoraPath.MERGED
        acts_from = job.stack.acts_from(context)
        self.acts_from = NEVER if acts_from is None else acts_from
        self.job = job
        self.context = context
        self.context_tokens = len(context)
        self.continuation = continuation
        self.cached_tokens: int | None = None
        self.tokens: list[TokenLogprob] = []
        self.is_greedy = True
        self.finite = True

    @property
    def decodes(self) -> bool:
        """Never: nobody is waiting for the next token."""
        return False

    @property
    def logits_from(self) -> int:
        """Behind the prompt's last token."""
        return self.context_tokens - 1

    def share_keys(self, other: ScoreSequence, block_size: int) -> None:
        """Take over the keys of the prompt's full blocks from a sequence that has the same prompt.

        Of a long prompt with hundreds of continuations, computing them takes as long as a step.
        """
        if self.copy is other.copy and self.context == other.context:
            self.keys = other.keys[: self.context_tokens // block_size]

    def on_logits(self, logits: torch.Tensor) -> None:
        """Note the continuation's likelihoods."""
        first = len(self.tokens)
        tokens = self.continuation[first : first + len(logits)]
        found = likelihoods(logits, tokens, [self.job.request.top_logprobs] * len(tokens))
        self.is_greedy = self.is_greedy and all(one.is_greedy for one in found)
        self.finite = self.finite and not any(math.isnan(one.logprob) for one in found)
        self.tokens += self.job.texts.describe(found)

    def on_complete(self, end: StepEnd, row: int) -> None:
        """Tell its job."""
        end.outputs += self.job.on_scored(self)

    def on_preempted(self) -> None:
        """Start anew."""
        self.tokens.clear()
        self.is_greedy = self.finite = True

    def on_scheduled(self, start: int, now: float) -> None:
        """Note when the job first runs, and how much of the prompt the cache held."""
        if self.cached_tokens is None:
            self.cached_tokens = start
        if self.job.first_scheduled is None:
            self.job.first_scheduled = now


class ScoreJob:
    """A score request on its way. It holds one pin of its adapters; a sequence that runs holds another.

    Args:
        pairs: the tokens of prompt and continuation, for each continuation.
        texts: spells single tokens out.
        arrival: by the engine's clock.
    """

    def __init__(
        self,
        request: ScoreRequest,
        stack: Stack,
        pairs: Tokens[tuple[Tokens[int], Tokens[int]]],
        texts: TokenTexts,
        arrival: float,
    ) -> None:
        self.texts = texts
        self.on_scored: Callable[[ScoreSequence], list[RequestOutput]] = lambda sequence: []
        """Set when it is queued: a continuation has run."""
        self.id = request.id
        self.request = request
        self.stack = stack
        self.sequences = [ScoreSequence(self, at, *pair) for at, pair in enumerate(pairs)]
        self.waiting = list(self.sequences)
        self.running: list[ScoreSequence] = []
        self.arrival = arrival
        self.first_scheduled: float | None = None
        self.first_scored: float | None = None


class Scoring:
    """The live score requests of one engine. Not thread-safe.

    Args:
        shares_prompts: the prefix cache is on: a prompt that fills a block is computed for the first
            continuation alone, and found there by the others, which start one step later.
    """

    def __init__(self, scheduler: Scheduler, paths: Paths, clock: Clock, *, shares_prompts: bool) -> None:
        self._clock = clock
        self._scheduler = scheduler
        self._paths = paths
        self._shares_prompts = shares_prompts
        self._jobs: dict[str, ScoreJob] = {}

    def __contains__(self, request_id: object) -> bool:
        """Whether a request of this id runs."""
        return request_id in self._jobs

    def add(self, job: ScoreJob) -> None:
        """Queue a prepared request."""
        assert job.id not in self._jobs, "request ids must be unique"
        self._jobs[job.id] = job
        job.on_scored = self._complete
        fills = job.sequences[0].logits_from >= self._scheduler.pool.block_size
        self._start(job, 1 if self._shares_prompts and fills else len(job.sequences))

    def _start(self, job: ScoreJob, count: int) -> None:
        started, job.waiting = job.waiting[:count], job.waiting[count:]
        for sequence in started:
            job.stack.pin()
            job.running.append(sequence)
            self._paths.queue(sequence)
            sequence.share_keys(job.sequences[0], self._scheduler.pool.block_size)
            self._scheduler.add(sequence)

    def _complete(self, sequence: ScoreSequence) -> list[RequestOutput]:
        """A sequence has run; returns its request's only output if that is its end."""
        job = sequence.job
        if job.id not in self._jobs:
            return []  # a continuation in the same step has ended it
        job.running.remove(sequence)
        self._scheduler.remove(sequence)
        if not sequence.finite:
            self._end(job)
            return [RequestOutput(job.id, error=PolygraftError("the model's logits are not finite"))]
        if job.first_scored is None:
            job.first_scored = self._clock()
        self._start(job, len(job.waiting))
        if job.running:
            return []
        self._end(job)
        scores = tuple(map(_score, job.sequences))
        return [
            RequestOutput(job.id, finished=_finished(job, FinishReason.SCORED, self._clock()), scores=scores)
        ]

    def abort(self, request_id: str) -> list[RequestOutput]:
        """End a request and free what it holds; its only output, or nothing if it has ended already."""
        job = self._jobs.get(request_id)
        if job is None:
            return []
        self._end(job)
        return [RequestOutput(job.id, finished=_finished(job, FinishReason.CANCELLED, self._clock()))]

    def fail_lost(self) -> list[RequestOutput]:
        """End the requests whose weights can't be had."""
        lost = [
            (job, error)
            for job in self._jobs.values()
            for sequence in job.running[:1]
            if (error := sequence.lost) is not None
        ]
        for job, _ in lost:
            self._end(job)
        return [RequestOutput(job.id, error=error) for job, error in lost]

    def _end(self, job: ScoreJob) -> None:
        del self._jobs[job.id]
        for sequence in job.running:
            self._scheduler.remove(sequence)
        job.stack.release()


def _score(sequence: ScoreSequence) -> ContinuationScore:
    return ContinuationScore(
        log_likelihood=math.fsum(token.logprob for token in sequence.tokens if token.logprob is not None),
        is_greedy=sequence.is_greedy,
        tokens=tuple(sequence.tokens),
    )


def _finished(job: ScoreJob, reason: FinishReason, now: float) -> Finished:
    first, scored = job.first_scheduled, job.first_scored
    return Finished(
        reason=reason,
        usage=Usage(
            prompt_tokens=sum(sequence.context_tokens for sequence in job.sequences),
            completion_tokens=sum(len(sequence.continuation) for sequence in job.sequences),
            cached_tokens=sum(sequence.cached_tokens or 0 for sequence in job.sequences),
            virtual_tokens=job.stack.virtual_tokens,
        ),
        timings=Timings(
            total=now - job.arrival,
            queue=None if first is None else first - job.arrival,
            prefill=None if first is None or scored is None else scored - first,
            time_to_first_token=None if scored is None else scored - job.arrival,
        ),
        seed=0,
        path=job.sequences[0].path,
        adapter_generations=job.stack.generations,
    )
