"""What the scheduler moves: runs of tokens that need keys, values and sometimes logits."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch

from polygraft.core.output import RequestOutput
from polygraft.errors import PolygraftError
from polygraft_types.requests import LoraPath

if TYPE_CHECKING:
    from polygraft.adapters.stack import Runs, Stack
    from polygraft.engine.residency.linear_combinations import LinearCombination
    from polygraft.engine.residency.merged_copies import MergedCopy
    from polygraft.engine.residency.resident_cache import Resident
    from polygraft.engine.sequences.prefix import SharedPrefix


NEVER = sys.maxsize
"""What `acts_from` is where adapters don't act at all."""


@dataclass(slots=True)
class StepEnd:
    """What sequences that have run to their last token do at the end of a step.

    Args:
        remove: takes a sequence out of the scheduler.
        adopt: makes a soft prompt's blocks a shared prefix.
        outputs: what the step brings for requests.
        sampling: sequences that want a next token, each with its row of the logits.
    """

    remove: Callable[[Sequence], None]
    adopt: Callable[[SoftPromptSequence], None]
    outputs: list[RequestOutput] = field(default_factory=list)
    sampling: list[tuple[Sequence, int]] = field(default_factory=list)


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

    is_request: ClassVar[bool] = True
    """Whether a client waits for it."""
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

    def decodes_from(self, start: int) -> bool:
        """Whether its tokens from `start` on have been generated, for the statistics."""
        return False

    def on_scheduled(self, start: int, now: float) -> None:
        """It is in the next step, with its tokens from `start` on."""

    def on_logits(self, logits: torch.Tensor) -> None:
        """Its next tokens have run.

        Args:
            logits: [rows, vocabulary] behind those of them at and after `logits_from`.
        """

    def on_complete(self, end: StepEnd, row: int) -> None:
        """All of its tokens have run.

        Args:
            row: of the step's logits, the one behind its last token.
        """

    def on_preempted(self) -> None:
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

    def on_complete(self, end: StepEnd, row: int) -> None:
        """Hand its blocks over."""
        end.adopt(self)
        end.remove(self)


class SmokeTestSequence(Sequence):
    """A few tokens whose logits tell what adapters do.

    Args:
        vocabulary: the base's; logits of tokens that the adapters don't know are left out.
        positions: so many of its last tokens' logits are wanted.
    """

    is_request = False

    def __init__(
        self, id: str, token_ids: list[int], stack: Stack, vocabulary: int, *, positions: int = 1
    ) -> None:
        super().__init__(id, token_ids, stack)
        own = (adapter.compiled.vocabulary for adapter in stack.adapters)
        self._vocabulary = next((size for size in own if size is not None), vocabulary)
        self._positions = positions
        self._parts: list[torch.Tensor] = []

    @property
    def logits_from(self) -> int:
        """As asked for."""
        return len(self.token_ids) - self._positions

    @property
    def logits(self) -> torch.Tensor | None:
        """float32 [positions, vocabulary], once it has run."""
        if sum(map(len, self._parts)) < self._positions:
            return None
        return torch.cat(self._parts)

    def on_logits(self, logits: torch.Tensor) -> None:
        """Keep them."""
        self._parts.append(logits[:, : self._vocabulary].float())

    def on_complete(self, end: StepEnd, row: int) -> None:
        """Leave the scheduler."""
        end.remove(self)

    def on_preempted(self) -> None:
        """Start anew."""
        self._parts.clear()
