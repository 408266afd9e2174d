"""The boundary between the server and the engine.

Requests, aborts and adapter commands go in; one batch of outputs per step comes out. `AsyncEngine`
implements it with an engine on a thread of this process.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Protocol

from polygraft.core.output import RequestOutput
from polygraft_types.adapters import AdapterInfo, MergeEvent, NearestToken
from polygraft_types.answers import Finished
from polygraft_types.requests import AdapterRef, Chat, LoraPath, Request, SamplingParams, ScoreRequest


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The base model as it is served; fields as in the contract's GetModelResponse."""

    model: str
    architecture: str
    dtype: str
    quantization: str
    device: str
    context_length: int
    vocabulary_size: int
    parameters: int
    weight_bytes: int
    kv_cache_bytes: int
    max_num_seqs: int
    max_num_batched_tokens: int
    eos_token_ids: tuple[int, ...]
    default_sampling: SamplingParams
    has_chat_template: bool
    default_lora_path: LoraPath = LoraPath.UNMERGED
    merged_capacity_bytes: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Occupancy:
    """What the engine holds at one moment.

    Args:
        running, waiting: requests.
        merged_bytes: of copies of the base's weights, those that are being made included.
        combinations: linear ones of several adapters that are in memory; `combined_bytes` as `merged_bytes`.
        kv_blocks_used: held by requests and virtual tokens; `kv_blocks_cached` are the free ones whose
            contents a prompt may still find.
    """

    running: int
    waiting: int
    kv_blocks_used: int
    kv_blocks_cached: int
    kv_blocks_total: int
    merged_copies: int = 0
    merged_bytes: int = 0
    merged_bytes_capacity: int = 0
    combinations: int = 0
    combined_bytes: int = 0
    combined_bytes_capacity: int = 0


@dataclass(frozen=True, slots=True)
class StepStats:
    """What one step did.

    Args:
        seconds: schedule, run and postprocess together.
        prefill_rows, decode_rows: tokens run through the base.
        adapters: (name, kind) of the distinct adapters whose requests shared the step.
        base_rows: whether requests without an adapter shared it too.
        preemptions: sequences that lost their blocks in it.
        waited: steps of other weights since the last one of these, while it had work.
        switched: whether it ran on other weights than the step before.
    """

    seconds: float
    path: str
    prefill_rows: int
    decode_rows: int
    adapters: tuple[tuple[str, str], ...]
    base_rows: bool
    preemptions: int
    waited: int = 0
    switched: bool = False


class Observer(Protocol):
    """Is told what happens, on the event loop's thread. `adapter` and `kind` are "" for the base, and
    `names.STACK` and `STACK_KIND` for a request of several adapters."""

    def request_submitted(self, adapter: str, kind: str) -> None:
        """A request entered the queue."""

    def tokens_generated(
        self, adapter: str, kind: str, path: str, count: int, interval: float | None
    ) -> None:
        """`count` tokens came out of one step, `interval` seconds after the request's previous ones
        (None for its first)."""

    def request_finished(
        self, adapter: str, kind: str, finished: Finished | None, error: Exception | None
    ) -> None:
        """A request ended, with exactly one of `finished` and `error`."""

    def step_finished(self, stats: StepStats) -> None:
        """A step ended."""

    def occupancy_changed(self, occupancy: Occupancy) -> None:
        """After a step, or a request that ended between steps, the engine holds this."""

    def adapter_changed(self, info: AdapterInfo) -> None:
        """What the registry says under a name is now this."""

    def adapter_load_failed(self, info: AdapterInfo) -> None:
        """A load failed; what was registered under the name before, if anything, still is."""

    def adapter_removed(self, info: AdapterInfo) -> None:
        """An adapter is gone."""

    def merge_ended(self, event: MergeEvent) -> None:
        """A merged copy was made, wasn't, or was given up."""

    def stream_unread(self, limit: str) -> None:
        """A stream was ended because too much of its output was unread; `limit` is "bytes"."""

    def unread_changed(self, unread: int) -> None:
        """After a step, so many bytes of output are unread in all streams together."""

    def path_decided(self, path: LoraPath) -> None:
        """AUTO sends the hot adapter's new requests this way from here on."""


class EngineClient(Protocol):
    """What the server needs of an engine. All methods are called on the event loop's thread."""

    @property
    def model(self) -> ModelInfo:
        """The base model as it is served."""

    @property
    def failure(self) -> BaseException | None:
        """What killed the engine, or None while it works."""

    def generate(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        """Run a request; the last output has `finished` set.

        Closing the generator early aborts the request and frees what it holds before the next step.

        Raises (at the first `__anext__`, before anything is queued):
            InvalidRequest, ContextLengthExceeded, AdapterNotFound, AdapterUnavailable,
            NotSupported, ResourceExhausted, Draining, EngineDead; the last also in mid-stream.
        """

    async def score(self, request: ScoreRequest) -> RequestOutput:
        """Score continuations; the output has `finished` and, unless it was cancelled, `scores` set.

        Cancelling the caller aborts the request and frees what it holds before the next step.

        Raises: as generate.
        """

    async def tokenize(self, prompt: str | Chat, adapters: Sequence[AdapterRef] = ()) -> tuple[int, ...]:
        """Token ids as `generate` would use them.

        Raises: InvalidRequest, AdapterNotFound, AdapterUnavailable, ResourceExhausted.
        """

    def model_for(self, adapters: Sequence[AdapterRef]) -> ModelInfo:
        """The model as requests with these adapters see it: vocabulary, end tokens and chat template may be
        an adapter's. Raises as `tokenize`.
        """

    async def detokenize(self, token_ids: Sequence[int], adapters: Sequence[AdapterRef] = ()) -> str:
        """Text without special tokens. Raises InvalidRequest for an id out of range; else as `tokenize`."""

    async def load_adapter(self, name: str, source: str = "") -> AdapterInfo:
        """Load the folder `source` (relative to the store; "" is `name`).

        Raises: InvalidRequest (name or source), AdapterInvalid, AdapterExists, AdapterUnavailable,
            ResourceExhausted, Draining, EngineDead.
        """

    async def unload_adapter(self, name: str, *, wait: bool = True) -> AdapterInfo:
        """Unload; wait for running requests, or refuse if there are any.

        Raises: AdapterNotFound, AdapterUnavailable (in use and `wait` is False), EngineDead.
        """

    async def update_adapter(self, name: str, *, merged: bool) -> AdapterInfo:
        """Keep a merged copy of the base for an adapter, or keep it no longer; returns when it is there.

        Raises: AdapterNotFound, AdapterUnavailable (it can't be merged, or not within the budget),
            ResourceExhausted, Draining, EngineDead.
        """

    async def reload_adapter(self, name: str) -> AdapterInfo:
        """Load its folder again under a new generation; the same generation if nothing changed.

        Raises: as load_adapter, and AdapterNotFound.
        """

    def get_adapter(self, name: str) -> AdapterInfo:
        """Raises AdapterNotFound."""

    def list_adapters(self) -> list[AdapterInfo]:
        """All of them by name, failed ones included."""

    async def nearest_tokens(self, name: str, count: int) -> list[list[NearestToken]]:
        """For each virtual token of a soft prompt, the vocabulary's `count` nearest tokens.

        Empty for an adapter without a soft prompt. Raises AdapterNotFound, AdapterUnavailable.
        """

    async def wait_failed(self) -> None:
        """Return when the engine has died."""

    async def drain(self, timeout: float) -> int:
        """Refuse new requests, wait until the running ones end; abort those left after `timeout`
        seconds and return how many these were. Then stop the engine."""
