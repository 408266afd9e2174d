"""What a step of the engine produces for a request."""

from __future__ import annotations

from dataclasses import dataclass

from polygraft.errors import PolygraftError
from polygraft_types.answers import ContinuationScore, Finished, TokenLogprob
from polygraft_types.requests import LoraPath


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """What one step produced for one request.

    `text` is whole characters only and never part of a stop sequence, so it may lag behind `token_ids`;
    `path` is the one they took. Exactly one output of a request has `finished` or `error` set, and it is the
    last.

    Args:
        prompt_ids: the prompt's tokens, on the first output of a request that has it echoed; `text` then
            begins with the prompt's.
        logprobs: of `prompt_ids` and `token_ids`, if asked for.
        scores: a score request's results, on its only output.
    """

    request_id: str
    text: str = ""
    token_ids: tuple[int, ...] = ()
    finished: Finished | None = None
    error: PolygraftError | None = None
    path: LoraPath = LoraPath.UNMERGED
    prompt_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    scores: tuple[ContinuationScore, ...] = ()

    @property
    def terminal(self) -> bool:
        """Whether this is the request's last output."""
        return self.finished is not None or self.error is not None
