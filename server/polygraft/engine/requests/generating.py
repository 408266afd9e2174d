"""The live generation requests: their next tokens, and their ends."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from polygraft.core.clock import Clock
from polygraft.core.output import RequestOutput
from polygraft.engine.sampling.logprobs import likelihoods
from polygraft.engine.sampling.penalties import adjust
from polygraft.engine.sampling.sampler import sample
from polygraft.engine.schedule.scheduler import Scheduler
from polygraft.engine.sequences.generate import GenerateSequence
from polygraft.engine.sequences.sequence import Sequence
from polygraft.errors import PolygraftError
from polygraft_types.answers import Finished, FinishReason, Timings, Usage


class Generating:
    """The live generation requests of one engine. Not thread-safe."""

    def __init__(self, scheduler: Scheduler, clock: Clock) -> None:
        self._scheduler = scheduler
        self._clock = clock
        self._running: dict[str, GenerateSequence] = {}

    def __contains__(self, request_id: object) -> bool:
        """Whether a request of this id runs."""
        return request_id in self._running

    def __iter__(self) -> Iterator[GenerateSequence]:
        """All of them."""
        return iter(self._running.values())

    def add(self, generation: GenerateSequence) -> None:
        """Queue one."""
        assert generation.id not in self._running, "request ids must be unique"
        self._running[generation.id] = generation
        self._scheduler.add(generation)

    def abort(self, request_id: str) -> list[RequestOutput]:
        """End one; its last output, or nothing if it has ended already."""
        generation = self._running.get(request_id)
        return [] if generation is None else [self._finish(generation, FinishReason.CANCELLED)]

    def expire(self) -> list[RequestOutput]:
        """End those whose time is up."""
        now = self._clock()
        late = [g for g in self._running.values() if g.deadline is not None and g.deadline <= now]
        return [
            self._finish(generation, FinishReason.TIME_LIMIT, generation.text.flush()) for generation in late
        ]

    def fail_lost(self) -> list[RequestOutput]:
        """End those whose weights can't be had."""
        lost = [(generation, error) for generation in self if (error := generation.lost) is not None]
        return [self._fail(generation, error) for generation, error in lost]

    def sample(self, asking: list[tuple[Sequence, int]], logits: torch.Tensor) -> list[RequestOutput]:
        """Sample the next tokens.

        Args:
            asking: requests, each with its row of the logits.
            logits: [rows, vocabulary]
        """
        generations = [self._running[sequence.id] for sequence, _ in asking]
        rows = [row for _, row in asking]
        if not generations:
            return []
        with torch.inference_mode():
            if len(rows) != len(logits):
                logits = logits[rows]
            wanting = [at for at, g in enumerate(generations) if g.request.response.wants_logprobs]
            raw = logits[wanting] if wanting else logits[:0]
            tokens = _picked(generations, logits)
        # Nobody is told the likelihoods of a row that fails.
        picked = [tokens[at] or 0 for at in wanting]
        top = [generations[at].request.response.top_logprobs for at in wanting]
        for at, likelihood in zip(wanting, likelihoods(raw, picked, top), strict=True):
            generations[at].untold.append(likelihood)
        now = self._clock()
        return [
            self._accept(generation, token, now)
            if token is not None and generation.finite
            else self._fail(generation, PolygraftError("the model's logits are not finite"))
            for generation, token in zip(generations, tokens, strict=True)
        ]

    def _accept(self, generation: GenerateSequence, token: int, now: float) -> RequestOutput:
        try:
            text, reason = generation.accept(token, now)
        except PolygraftError as error:  # its tokenizer, possibly an adapter's, fails
            return self._fail(generation, error)
        if reason is not None:
            return self._finish(generation, reason, text, token)
        output = RequestOutput(generation.id, text, (token,), path=generation.path)
        return generation.completed(output)

    def _finish(
        self, generation: GenerateSequence, reason: FinishReason, text: str = "", token: int | None = None
    ) -> RequestOutput:
        self._remove(generation)
        now = self._clock()
        first, scheduled = generation.first_token, generation.first_scheduled
        finished = Finished(
            reason=reason,
            usage=Usage(
                prompt_tokens=generation.prompt_tokens,
                completion_tokens=generation.completion_tokens,
                cached_tokens=generation.cached_tokens,
                virtual_tokens=generation.stack.virtual_tokens,
            ),
            timings=Timings(
                total=now - generation.arrival,
                queue=None if scheduled is None else scheduled - generation.arrival,
                prefill=None if first is None or scheduled is None else first - scheduled,
                time_to_first_token=None if first is None else first - generation.arrival,
            ),
            seed=generation.request.sampling.seed,
            path=generation.path,
            adapter_generations=generation.stack.generations,
            stop_sequence=generation.text.matched,
            stop_token_id=token if reason == FinishReason.STOP else None,
            preemptions=generation.preemptions,
        )
        tokens = () if token is None else (token,)
        output = RequestOutput(generation.id, text, tokens, finished=finished, path=generation.path)
        return generation.completed(output)

    def _fail(self, generation: GenerateSequence, error: PolygraftError) -> RequestOutput:
        self._remove(generation)
        return RequestOutput(generation.id, error=error)

    def _remove(self, generation: GenerateSequence) -> None:
        del self._running[generation.id]
        self._scheduler.remove(generation)


def _picked(generations: list[GenerateSequence], logits: torch.Tensor) -> list[int | None]:
    """Pick the next token of each request by its row of the logits; None if that isn't finite."""
    params = [generation.request.sampling for generation in generations]
    logits = adjust(
        logits,
        params,
        [generation.token_ids for generation in generations],
        [generation.prompt_tokens for generation in generations],
    )
    for row, generation in zip(logits, generations, strict=True):
        if not generation.may_stop and generation.stop_token_ids:
            row[list(generation.stop_token_ids)] = -torch.inf
    return sample(logits, params, [generation.num_tokens for generation in generations])
