"""From a request to a sequence that can be queued: everything that can be wrong with it is found here."""

from __future__ import annotations

from polygraft.adapters.registry import Adapter, AdapterRegistry
from polygraft.base.loader import Base
from polygraft.engine.adapter_prompts import AdapterPrompts
from polygraft.engine.block_pool import BlockPool
from polygraft.engine.merged_copies import MergedCopies
from polygraft.engine.request import DEFAULT_MAX_NEW_TOKENS, LoraPath, Request, ScoreRequest
from polygraft.engine.scoring import ScoreJob
from polygraft.engine.sequence import Generation
from polygraft.errors import ContextLengthExceeded, InvalidRequest, PolygraftError


class Intake:
    """Prepares requests, on any thread: it reads the pool's size only, and the registry has a lock."""

    def __init__(
        self,
        base: Base,
        prompts: AdapterPrompts,
        registry: AdapterRegistry,
        copies: MergedCopies,
        pool: BlockPool,
    ) -> None:
        self._base = base
        self._prompts = prompts
        self._registry = registry
        self._copies = copies
        self._pool = pool

    def prepare(self, request: Request) -> Generation:
        """Check a request, resolve its adapter and pin it, and tokenize; may run on any thread.

        Raises:
            InvalidRequest, ContextLengthExceeded, AdapterNotFound, AdapterUnavailable.
        """
        self._check_path(request)
        adapter = None if request.adapter is None else self._registry.resolve(request.adapter)
        prompts = self._prompts.of(adapter)
        try:
            prompt_ids = list(prompts.token_ids(request.prompt))
            self._check_path(request, adapter)
            max_new_tokens = self._check_length(request, len(prompt_ids), adapter)
            prompts.check_ids(request.stopping.stop_token_ids, "stopping.stop_token_ids")
        except PolygraftError:
            if adapter is not None:
                adapter.release()
            raise
        stops = set(request.stopping.stop_token_ids)
        if not request.stopping.ignore_eos:
            stops |= set(prompts.eos_token_ids)
        text = prompts.text_stream(prompt_ids, request.stopping.stop)
        return Generation(request, prompt_ids, adapter, text, frozenset(stops), max_new_tokens)

    def prepare_score(self, request: ScoreRequest) -> ScoreJob:
        """As `prepare`, for continuations to score.

        Raises:
            InvalidRequest, ContextLengthExceeded, AdapterNotFound, AdapterUnavailable.
        """
        self._check_path(request)
        adapter = None if request.adapter is None else self._registry.resolve(request.adapter)
        try:
            pairs = self._prompts.of(adapter).pairs(request.prompt, request.continuations)
            self._check_path(request, adapter)
            for at, (context, continuation) in enumerate(pairs):
                self._check_score_length(f"continuations[{at}]", len(context), len(continuation), adapter)
        except PolygraftError:
            if adapter is not None:
                adapter.release()
            raise
        return ScoreJob(request, adapter, pairs)

    def _check_path(self, request: Request | ScoreRequest, adapter: Adapter | None = None) -> None:
        """Raise InvalidRequest or AdapterUnavailable where MERGED is demanded and can't be had."""
        if request.lora_path is not LoraPath.MERGED or not request.path_required:
            return
        if request.adapter is None:
            raise InvalidRequest("lora_path", "MERGED needs an adapter to merge")
        if adapter is not None:
            self._copies.check(adapter)

    def _check_score_length(self, field: str, prompt: int, tokens: int, adapter: Adapter | None) -> None:
        """Raises ContextLengthExceeded unless all but the last token, which isn't run, fit."""
        virtual = adapter.compiled.virtual_tokens if adapter else 0
        counts = f"{virtual} virtual + {prompt} prompt + {tokens} continuation tokens"
        context, pool = self._base.context_length, self._pool
        if virtual + prompt + tokens - 1 > context:
            raise ContextLengthExceeded(field, f"{counts} are more than {context} and a last one")
        if pool.blocks_for(virtual) + pool.blocks_for(prompt + tokens - 1) > pool.num_blocks:
            held = pool.num_blocks * pool.block_size
            raise ContextLengthExceeded(field, f"{counts}, the KV cache holds {held} (--kv-cache-bytes)")

    def _check_length(self, request: Request, prompt_tokens: int, adapter: Adapter | None) -> int:
        """Settle max_new_tokens; raises ContextLengthExceeded."""
        virtual = adapter.compiled.virtual_tokens if adapter else 0
        context = self._base.context_length
        asked = request.stopping.max_new_tokens
        if asked is None:
            asked = max(1, min(DEFAULT_MAX_NEW_TOKENS, context - virtual - prompt_tokens))
        total = virtual + prompt_tokens + asked
        counts = f"{prompt_tokens} prompt tokens + {asked} new tokens"
        if virtual:
            counts = f"{virtual} virtual tokens + {counts}"
        if total > context:
            raise ContextLengthExceeded("prompt", f"{counts} = {total}, the context holds {context}")
        pool = self._pool
        if pool.blocks_for(virtual) + pool.blocks_for(prompt_tokens + asked) > pool.num_blocks:
            held = pool.num_blocks * pool.block_size
            raise ContextLengthExceeded(
                "prompt", f"{counts} = {total}, the KV cache holds {held} (--kv-cache-bytes)"
            )
        if request.stopping.min_new_tokens > asked:
            raise InvalidRequest("stopping.min_new_tokens", f"must be at most max_new_tokens, {asked}")
        return asked
