"""From a request to a sequence that can be queued: everything that can be wrong with it is found here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from polygraft.adapters.linear_combination import check_linear
from polygraft.adapters.registry import Adapter, AdapterRegistry
from polygraft.adapters.stack import Stack, check_stack
from polygraft.base.loader import Base
from polygraft.core.clock import Clock
from polygraft.engine.cache.block_pool import BlockPool
from polygraft.engine.prompts.adapter_prompts import AdapterPrompts
from polygraft.engine.prompts.prompts import Prompts
from polygraft.engine.requests.scoring import ScoreJob
from polygraft.engine.residency.linear_combinations import LinearCombinations
from polygraft.engine.residency.merged_copies import MergedCopies
from polygraft.engine.sequences.generate import GenerateSequence
from polygraft.errors import AdapterUnavailable, ContextLengthExceeded, InvalidRequest
from polygraft_types.requests import (
    DEFAULT_MAX_NEW_TOKENS,
    AdapterRef,
    CombinationType,
    LoraPath,
    Request,
    ScoreRequest,
)


class Intake:
    """Prepares requests, on any thread: it reads the pool's size only, and the registry has a lock."""

    def __init__(
        self,
        base: Base,
        prompts: AdapterPrompts,
        registry: AdapterRegistry,
        copies: MergedCopies,
        combinations: LinearCombinations,
        pool: BlockPool,
        clock: Clock,
    ) -> None:
        self._clock = clock
        self._base = base
        self._prompts = prompts
        self._registry = registry
        self._copies = copies
        self._combinations = combinations
        self._pool = pool

    def prepare(self, request: Request) -> GenerateSequence:
        """Check a request, resolve its adapters and pin them, and tokenize; may run on any thread.

        Raises:
            InvalidRequest, ContextLengthExceeded, AdapterNotFound, AdapterUnavailable, ChatTemplateFailed,
            TokenizerFailed, ResourceExhausted.
        """
        arrival = self._clock()
        self._check_path(request)
        with self._holding(request) as stack:
            prompts = self._prompts.of(stack)
            prompt_ids = list(prompts.token_ids(request.prompt))
            self._check_invocation(stack, prompt_ids)
            self._check_copy(request, stack)
            max_new_tokens = self._check_length(request, len(prompt_ids), stack)
            prompts.check_ids(request.stopping.stop_token_ids, "stopping.stop_token_ids")
            prompts.check_biased([token for token, _ in request.sampling.logit_bias])
            echo = ""
            if request.response.echo:
                given = request.prompt
                echo = given if isinstance(given, str) else prompts.decode(prompt_ids)
            stops = set(request.stopping.stop_token_ids)
            if not request.stopping.ignore_eos:
                stops |= set(prompts.eos_token_ids)
            text = prompts.text_stream(prompt_ids, request.stopping.stop)
            return GenerateSequence(
                request,
                prompt_ids,
                stack,
                text,
                prompts.texts,
                frozenset(stops),
                max_new_tokens,
                arrival,
                echo,
            )

    def prepare_score(self, request: ScoreRequest) -> ScoreJob:
        """As `prepare`, for continuations to score.

        Raises:
            InvalidRequest, ContextLengthExceeded, AdapterNotFound, AdapterUnavailable, ChatTemplateFailed,
            TokenizerFailed, ResourceExhausted.
        """
        self._check_path(request)
        with self._holding(request) as stack:
            prompts = self._prompts.of(stack)
            pairs = prompts.pairs(request.prompt, request.continuations)
            self._check_copy(request, stack)
            for at, (context, continuation) in enumerate(pairs):
                self._check_invocation(stack, context)
                self._check_score_length(f"continuations[{at}]", len(context), len(continuation), stack)
            return ScoreJob(request, stack, pairs, prompts.texts, self._clock())

    def prompts_of(self, refs: Sequence[AdapterRef]) -> Prompts:
        """Return tokenizer and template of requests with these adapters. Raises as `resolve`."""
        stack = self.resolve(refs)
        try:
            return self._prompts.of(stack)
        finally:
            stack.release()

    def may_bring_prompts(self, ref: AdapterRef) -> bool:
        """Whether an adapter has a tokenizer or template of its own; an older generation may have."""
        info = self._registry.find(ref.name)
        return info is not None and (ref.generation is not None or info.own_prompts)

    @contextmanager
    def _holding(self, request: Request | ScoreRequest) -> Iterator[Stack]:
        """A request's adapters, pinned, and released if preparing the request fails for any reason.

        Raises: as `resolve`.
        """
        stack = self.resolve(request.adapters, request.combination_type)
        try:
            yield stack
        except BaseException:
            stack.release()
            raise

    def resolve(
        self, refs: Sequence[AdapterRef], combination_type: CombinationType = CombinationType.STACK
    ) -> Stack:
        """The adapters that a request names, pinned; none are if any can't be had.

        Raises:
            AdapterNotFound, AdapterUnavailable: one of them can't be had, or there is no room for what they
                are together.
            InvalidRequest: they have no defined meaning together, or a weight has none.
        """
        members: list[tuple[Adapter, float]] = []
        try:
            for ref in refs:
                members.append((self._registry.resolve(ref), ref.weight))
            stack = Stack(members, combination_type)
            if not stack.combines:
                check_stack(members)
            elif not self._combinations.knows(stack):
                check_linear(members)
                self._combinations.check(stack)
        except BaseException:
            for adapter, _ in members:
                adapter.release()
            raise
        return stack

    @staticmethod
    def _check_path(request: Request | ScoreRequest) -> None:
        """Raise InvalidRequest where a combination is asked for of nothing, or MERGED is demanded and no
        adapter could have it."""
        combines = request.combination_type is CombinationType.LINEAR
        if combines and not request.adapters:
            raise InvalidRequest("combination_type", "LINEAR needs adapters to combine")
        if request.lora_path is not LoraPath.MERGED or not request.path_required:
            return
        if not request.adapters:
            raise InvalidRequest("lora_path", "MERGED needs an adapter to merge")
        if len(request.adapters) > 1:
            raise InvalidRequest(
                "lora_path", "MERGED takes one adapter: a copy has one adapter's weights in it"
            )
        if combines:
            raise InvalidRequest("lora_path", "MERGED takes an adapter as it is, and no LINEAR combination")
        if request.adapters[0].weight != 1.0:
            raise InvalidRequest("lora_path", "MERGED takes an adapter of weight 1: a copy has that of it")

    def _check_copy(self, request: Request | ScoreRequest, stack: Stack) -> None:
        """Raise AdapterUnavailable where a path is demanded of an adapter that can't be had on it."""
        adapter = stack.only
        if adapter is None or not request.path_required:
            return
        if request.lora_path is LoraPath.MERGED:
            self._copies.check(adapter)
        if request.lora_path is LoraPath.UNMERGED and adapter.compiled.merged_only:
            why = "changes the base's weights by more than a low rank: it is served merged only"
            raise AdapterUnavailable(adapter.name, f"{adapter.compiled.kind} {why}")

    @staticmethod
    def _check_invocation(stack: Stack, prompt: Sequence[int]) -> None:
        """Raise InvalidRequest where an activated LoRA would never act."""
        if stack.acts_from(prompt) is None:
            adapter = stack.adapters[0]
            tokens = list(adapter.compiled.invocation)
            raise InvalidRequest(
                "prompt",
                f"doesn't hold the tokens {tokens} that invoke {adapter.name!r}: it would do nothing",
            )

    def _check_score_length(self, field: str, prompt: int, tokens: int, stack: Stack) -> None:
        """Raises ContextLengthExceeded unless all but the last token, which isn't run, fit."""
        virtual = stack.virtual_tokens
        counts = f"{virtual} virtual + {prompt} prompt + {tokens} continuation tokens"
        context, pool = self._base.context_length, self._pool
        if virtual + prompt + tokens - 1 > context:
            raise ContextLengthExceeded(field, f"{counts} are more than {context} and a last one")
        if pool.blocks_for(virtual) + pool.blocks_for(prompt + tokens - 1) > pool.num_blocks:
            held = pool.num_blocks * pool.block_size
            raise ContextLengthExceeded(field, f"{counts}, the KV cache holds {held} (--kv-cache-bytes)")

    def _check_length(self, request: Request, prompt_tokens: int, stack: Stack) -> int:
        """Settle max_new_tokens; raises ContextLengthExceeded."""
        virtual = stack.virtual_tokens
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
