"""What the scheduler moves: runs of tokens that need keys, values and sometimes logits."""

from __future__ import annotations

import math
import sys
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, ClassVar

import torch

from polygraft.engine.sampling.logprobs import Likelihood, likelihoods
from polygraft.engine.tokenizers.text_stream import TextStream
from polygraft.errors import PolygraftError
from polygraft_types.answers import FinishReason, TokenLogprob
from polygraft_types.requests import LoraPath, Request

if TYPE_CHECKING:
    from polygraft.adapters.stack import Runs, Stack
    from polygraft.engine.residency.linear_combinations import LinearCombination
    from polygraft.engine.residency.merged_copies import MergedCopy
    from polygraft.engine.residency.resident_cache import Resident
    from polygraft.engine.sequences.prefix import SharedPrefix


NEVER = sys.maxsize
"""What `acts_from` is where adapters don't act at all."""


class Sequence:
    """Tokens to run through the base under adapters.

    The scheduler owns `order` (of arrival), `num_computed`, `blocks` and `prefix`; the last three are empty
    while it waits. The prefix cache owns `keys`, one for each full block of tokens so far.

    `path` is AUTO until it is admitted, if the server is to decide; what it is admitted with it keeps, since
    its keys and values belong to it. `copy` is the merged copy it runs on, None being the base's own weights.
    `combination` is what runs in the place of its adapters, if anything does.

    `acts_from` is the first token that its adapters act on: an activated LoRA begins inside the prompt.

    Args:
        id: unique among the live sequences.
        token_ids: what is known so far, the prompt; generated tokens are appended.
        stack: its adapters, pinned for as long as the sequence lives.
    """

    cacheable: ClassVar[bool] = False
    """Whether its blocks may be shared with later sequences that begin with the same tokens."""

    def __init__(self, id: str, token_ids: list[int], stack: Stack) -> None:
        self.id = id
        self.token_ids = token_ids
        self.stack = stack
        acts_from = stack.acts_from(token_ids)
        self.acts_from = NEVER if acts_from is None else acts_from
        self.order = 0
        self.num_computed = 0
        self.blocks: list[int] = []
        self.prefix: SharedPrefix | None = None
        self.keys: list[bytes] = []
        self.path = LoraPath.UNMERGED
        self.copy: MergedCopy | None = None
        self.combination: LinearCombination | None = None
        self._holds = ExitStack()

    def hold(self, item: Resident) -> None:
        """Hold a copy or a combination until the sequence is released."""
        self._holds.enter_context(item.held())

    def release(self) -> None:
        """Let go of the copy or combination, and of its adapters."""
        self._holds.close()
        self.stack.release()

    def assign(self, copy: MergedCopy | None) -> None:
        """Change the weights that a waiting sequence is to run on."""
        if copy is not self.copy:
            self.copy = copy
            self.keys.clear()

    @property
    def num_tokens(self) -> int:
        """Tokens known so far."""
        return len(self.token_ids)

    @property
    def remaining(self) -> int:
        """Known tokens whose keys and values aren't in the cache; 1 for one that decodes."""
        return len(self.token_ids) - self.num_computed

    @property
    def decodes(self) -> bool:
        """Whether its next step yields a token that a client waits for, so that it isn't held back."""
        return len(self.token_ids) - self.num_computed == 1

    @property
    def logits_from(self) -> int:
        """The first of its tokens behind which logits are wanted; they are behind all later ones as well."""
        return len(self.token_ids) - 1

    @property
    def wants_prefix(self) -> bool:
        """Whether an adapter's virtual tokens must be in the cache before it starts."""
        return self.stack.prefix is not None

    @property
    def runs(self) -> Runs:
        """Its side paths."""
        if self.combination is not None:
            return self.combination.runs
        return () if self.copy is not None else self.stack.runs

    @property
    def lost(self) -> PolygraftError | None:
        """Why the weights that it waits for can't be had; None if they can."""
        waits_for = self.copy or self.combination
        return None if waits_for is None else waits_for.error

    @property
    def embeddings(self) -> torch.Tensor | None:
        """[tokens, hidden] to run instead of the tokens' own embeddings."""
        return None

    def note_preempted(self) -> None:
        """Its blocks were taken away; it starts again from its tokens."""


class SoftPromptSequence(Sequence):
    """A soft prompt on its way through the base and its stack; its blocks become their shared prefix."""

    def __init__(self, id: str, stack: Stack, embeddings: torch.Tensor, target: SharedPrefix) -> None:
        super().__init__(id, [0] * len(embeddings), stack)
        self._embeddings = embeddings
        self.target = target

    @property
    def logits_from(self) -> int:
        """Behind none: its keys and values are all that is wanted."""
        return len(self.token_ids)

    @property
    def wants_prefix(self) -> bool:
        """It is the prefix."""
        return False

    @property
    def embeddings(self) -> torch.Tensor:
        """The soft prompt."""
        return self._embeddings


class CanarySequence(Sequence):
    """A few tokens whose logits tell what adapters do.

    Args:
        positions: so many of its last tokens' logits are wanted.
    """

    def __init__(self, id: str, token_ids: list[int], stack: Stack, *, positions: int = 1) -> None:
        super().__init__(id, token_ids, stack)
        self._positions = positions
        self._parts: list[torch.Tensor] = []

    @property
    def logits_from(self) -> int:
        """As asked for."""
        return len(self.token_ids) - self._positions

    def take(self, logits: torch.Tensor) -> None:
        """Note the logits [rows, vocabulary] behind its next tokens."""
        self._parts.append(logits.float())

    def note_preempted(self) -> None:
        """It will run anew."""
        self._parts.clear()

    @property
    def logits(self) -> torch.Tensor | None:
        """float32 [positions, vocabulary], once it has run."""
        if sum(map(len, self._parts)) < self._positions:
            return None
        return torch.cat(self._parts)


class Generation(Sequence):
    """A request on its way.

    An echo with log-probabilities needs the logits after all of the prompt's tokens, once. `untold` and, with
    texts, `described` hold likelihoods that haven't been output yet; `echo_due` says whether the
    prompt hasn't.

    Args:
        text: turns its tokens into text and looks for stop sequences.
        stop_token_ids: what ends it, the model's end-of-sequence tokens included.
        max_new_tokens: settled, at least 1.
        echo: the prompt's text, if it is to precede the answer.
    """

    cacheable = True

    def __init__(
        self,
        request: Request,
        prompt_ids: list[int],
        stack: Stack,
        text: TextStream,
        stop_token_ids: frozenset[int],
        max_new_tokens: int,
        echo: str = "",
    ) -> None:
        super().__init__(request.id, prompt_ids, stack)
        self.request = request
        self.prompt_tokens = len(prompt_ids)
        self.text = text
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
        self.arrival = time.monotonic()
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

    def take_prompt(self, logits: torch.Tensor) -> None:
        """Note the logits [rows, vocabulary] behind the next of its tokens; the prompt's last isn't noted."""
        first = len(self.untold) + len(self.described) + 1
        rows = min(len(logits), self.prompt_tokens - first)
        if self.logits_from == 0 and rows > 0:
            top = self.request.response.top_logprobs
            found = likelihoods(logits[:rows], self.token_ids[first : first + rows], [top] * rows)
            self.finite = self.finite and not any(math.isnan(one.logprob) for one in found)
            self.untold += found

    def note_preempted(self) -> None:
        """Counted, for its end; what it knows of its prompt is computed anew."""
        self.preemptions += 1
        self.untold.clear()
        self.described.clear()

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
