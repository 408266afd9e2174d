"""The sequence of a generation request."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from polygraft.core.output import RequestOutput
from polygraft.engine.sampling.logprobs import Likelihood, TokenTexts, likelihoods
from polygraft.engine.sequences.sequence import Sequence, StepEnd
from polygraft.engine.tokenizers.text_stream import TextStream
from polygraft_types.answers import FinishReason, TokenLogprob
from polygraft_types.requests import Request

if TYPE_CHECKING:
    from polygraft.adapters.stack import Stack


class GenerateSequence(Sequence):
    """A generation request on its way.

    An echo with log-probabilities needs the logits after all of the prompt's tokens, once. `untold` and, with
    texts, `described` hold likelihoods that haven't been output yet; `echo_due` says whether the
    prompt hasn't.

    Args:
        text: turns its tokens into text and looks for stop sequences.
        texts: spells single tokens out, for log-probabilities.
        stop_token_ids: what ends it, the model's end-of-sequence tokens included.
        max_new_tokens: settled, at least 1.
        arrival: by the engine's clock.
        echo: the prompt's text, if it is to precede the answer.
    """

    cacheable = True

    def __init__(
        self,
        request: Request,
        prompt_ids: list[int],
        stack: Stack,
        text: TextStream,
        texts: TokenTexts,
        stop_token_ids: frozenset[int],
        max_new_tokens: int,
        arrival: float,
        echo: str = "",
    ) -> None:
        super().__init__(request.id, prompt_ids, stack)
        self.request = request
        self.prompt_tokens = len(prompt_ids)
        self.text = text
        self._texts = texts
        self.stop_token_ids = stop_token_ids
        self.max_new_tokens = max_new_tokens
        self.path = request.lora_path
        self.preemptions = 0
        self.cached_tokens = 0
        self.untold: list[Likelihood] = []
        self.described: list[TokenLogprob] = []
        self.finite = True
        """Whether the prompt's logits noted so far are finite."""
        self.echo = echo
        self.echo_due = request.response.echo
        self.arrival = arrival
        limit = request.stopping.time_limit
        self.deadline = None if limit is None else self.arrival + limit
        self.first_scheduled: float | None = None
        self.first_token: float | None = None

    @property
    def completion_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.prompt_tokens

    @property
    def logits_from(self) -> int:
        """Behind its last token, but for an echo that is still to come."""
        response = self.request.response
        if response.echo and response.wants_logprobs and self.first_token is None:
            return 0
        return len(self.token_ids) - 1

    def decodes_from(self, start: int) -> bool:
        """Whether its tokens from `start` on have been generated."""
        return start >= self.prompt_tokens

    def on_scheduled(self, start: int, now: float) -> None:
        """Note when it first runs, and how much of its prompt the cache held."""
        if self.first_scheduled is None:
            self.first_scheduled = now
            self.cached_tokens = start

    def on_logits(self, logits: torch.Tensor) -> None:
        """Note the prompt's likelihoods, if they are asked for; the prompt's last token isn't noted."""
        first = len(self.untold) + len(self.described) + 1
        rows = min(len(logits), self.prompt_tokens - first)
        if self.logits_from == 0 and rows > 0:
            top = self.request.response.top_logprobs
            found = likelihoods(logits[:rows], self.token_ids[first : first + rows], [top] * rows)
            self.finite = self.finite and not any(math.isnan(one.logprob) for one in found)
            self.untold += found
        self._describe()

    def on_complete(self, end: StepEnd, row: int) -> None:
        """Ask for the next token."""
        end.sampling.append((self, row))

    def on_preempted(self) -> None:
        """Count it; what is known of the prompt is computed anew."""
        self.preemptions += 1
        self.untold.clear()
        self.described.clear()

    def _describe(self) -> None:
        """Add texts to the new likelihoods. Called after every step, since doing a whole prompt's at once
        would take longer than a step."""
        if self.untold:
            self.described += self._texts.describe(self.untold)
            self.untold.clear()

    def completed(self, output: RequestOutput) -> RequestOutput:
        """Add to an output what the request asked for and hasn't got yet: log-probabilities, and the echo."""
        self._describe()
        logprobs = tuple(self.described)
        self.described.clear()
        if not self.echo_due:
            return replace(output, logprobs=logprobs) if logprobs else output
        self.echo_due = False
        prompt_ids = tuple(self.token_ids[: self.prompt_tokens])
        if self.request.response.wants_logprobs:
            first = prompt_ids[0]
            logprobs = (TokenLogprob(first, self._texts(first), None), *logprobs)
        return replace(output, text=self.echo + output.text, prompt_ids=prompt_ids, logprobs=logprobs)

    @property
    def may_stop(self) -> bool:
        """Whether the next token may be one that ends it."""
        return self.completion_tokens >= self.request.stopping.min_new_tokens

    def accept(self, token: int, now: float) -> tuple[str, FinishReason | None]:
        """Append a sampled token; returns the text that is now final, and the finish reason if it ends here.

        Raises:
            PolygraftError: the tokenizer fails on this token.
        """
        if self.first_token is None:
            self.first_token = now
        stops = token in self.stop_token_ids and self.may_stop
        self.token_ids.append(token)
        if stops:
            text = self.text.end(token)
            return text, FinishReason.STOP if self.text.matched is None else FinishReason.STOP_SEQUENCE
        text = self.text.push(token, match=self.completion_tokens >= self.request.stopping.min_new_tokens)
        if self.text.matched is not None:
            return text, FinishReason.STOP_SEQUENCE
        if self.completion_tokens >= self.max_new_tokens:
            return text + self.text.flush(), FinishReason.LENGTH
        return text, None
