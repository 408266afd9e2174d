"""The engine: submit requests, call `step()`, take outputs."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Hashable, Iterable

import torch

from polygraft.adapters.files.store import AdapterStore
from polygraft.adapters.limits import adapter_limits
from polygraft.adapters.registry import Adapter, AdapterRegistry
from polygraft.base.loader import Base
from polygraft.base.optimize.layer_fusing import fuse_decoder_layers
from polygraft.config import ServerConfig
from polygraft.core.clock import Clock
from polygraft.core.output import RequestOutput
from polygraft.engine.cache.block_pool import BlockPool
from polygraft.engine.cache.kv_cache import KVCache
from polygraft.engine.cache.prefix_cache import PrefixCache
from polygraft.engine.cache.shared_prefix import SharedPrefixes
from polygraft.engine.client import Occupancy
from polygraft.engine.events import Events
from polygraft.engine.loading.adapter_manager import AdapterManager
from polygraft.engine.loading.adapter_rules import AdapterRules, Room
from polygraft.engine.loading.load_memory import LoadMemory
from polygraft.engine.loading.merge_commands import DEVIATION_TEXTS, MergeCommands
from polygraft.engine.loading.smoke_tests import SmokeTests
from polygraft.engine.machine.memory_plan import plan_for
from polygraft.engine.model_info import model_info
from polygraft.engine.model_runner import ModelRunner
from polygraft.engine.prompts.adapter_prompts import AdapterPrompts
from polygraft.engine.requests.generating import Generating
from polygraft.engine.requests.input_processor import Intake
from polygraft.engine.requests.scoring import ScoreJob, Scoring
from polygraft.engine.residency.background import BackgroundWork
from polygraft.engine.residency.linear_combinations import LinearCombinations
from polygraft.engine.residency.merged_copies import MergedCopies
from polygraft.engine.schedule.paths import Paths
from polygraft.engine.schedule.scheduler import Batch, Scheduler
from polygraft.engine.schedule.step_cost import StepCost
from polygraft.engine.sequences.generate import GenerateSequence
from polygraft.engine.sequences.sequence import Sequence, StepEnd
from polygraft.engine.step_result import StepResult, step_stats
from polygraft.errors import InvalidRequest
from polygraft.layers.adapter_bank import AdapterBank
from polygraft.layers.linear.merging import WeightSwitch
from polygraft.layers.operators import operators_for
from polygraft.layers.step import StepContext
from polygraft_types.requests import LoraPath, Request, ScoreRequest

log = logging.getLogger(__name__)


class Engine:
    """One base model, many adapters, any mix of them in every step.

    Not thread-safe but for `prepare`: one thread submits, aborts and steps. `AsyncEngine` runs it beside an
    event loop.

    Args:
        base: the engine wraps its modules and owns it from here on.
        native: False runs the operators in torch instead of C++, for tests and comparisons.

    Raises:
        ConfigError: the cache's budget is too small.
    """

    def __init__(self, base: Base, config: ServerConfig, *, native: bool = True) -> None:
        self.base = base
        self.clock = Clock()
        self.config = config
        self.plan = plan_for(base, config)
        step = StepContext()
        kernels = operators_for(base.device, native=native).kernels
        bank = AdapterBank(base.model, base.spec, step, native)
        self.kv_cache = KVCache(
            base.model,
            base.spec.attention,
            step,
            budget=self.plan.cache,
            block_size=config.block_size,
            dtype=base.dtype,
            device=base.device,
            kernels=kernels,
        )
        fused_model = fuse_decoder_layers(base.model, bank.bottlenecks.by_layer, step, kernels)
        self.step_cost = StepCost.of_model(base.spec, config.max_step_ms / 1000)
        pool = BlockPool(self.kv_cache.num_blocks, config.block_size)
        self.scheduler = Scheduler(
            pool,
            SharedPrefixes(pool, self.kv_cache),
            PrefixCache(pool, enabled=config.prefix_caching),
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            cost=self.step_cost,
        )
        switch = WeightSwitch()
        self.runner = ModelRunner(base, bank, switch, step, config.block_size, fused_model)
        self.prompts = AdapterPrompts(base)
        self.background = BackgroundWork()
        self.events: Events = []
        registry = AdapterRegistry(config.max_adapters)
        self._keep_residents(bank, switch, registry)
        self._load_adapters(bank, registry)
        self.intake = Intake(base, self.prompts, registry, self.copies, self.combinations, pool, self.clock)
        self.model = model_info(
            base,
            config,
            kv_cache_bytes=self.kv_cache.bytes,
            merged_capacity_bytes=self.copies.budget,
            prompts=self.prompts.base,
        )
        self._told: Occupancy | None = None
        self._generating = Generating(self.scheduler, self.clock)
        self._scoring = Scoring(self.scheduler, self.paths, self.clock, shares_prompts=config.prefix_caching)

    def _keep_residents(self, bank: AdapterBank, switch: WeightSwitch, registry: AdapterRegistry) -> None:
        """Make what keeps merged copies and linear combinations, and what decides who runs on them."""
        base, config = self.base, self.config
        requantized = base.quantization != "none" and config.requantize_merged
        self.copies = MergedCopies(
            bank,
            switch,
            registry,
            self.background,
            self.events,
            budget=self.plan.merged,
            requantize=requantized,
            dtype=base.quantization if requantized else str(base.dtype).removeprefix("torch."),
        )
        self.combinations = LinearCombinations(
            bank,
            self.background,
            budget=self.plan.combined,
            most=config.max_adapters,
            dtype=adapter_limits(config, base.dtype).dtype or torch.float32,
        )
        # int8 products are faster than those of a copy in the compute type; 4-bit ones are slower.
        worthwhile = base.quantization != "int8" or requantized
        self.paths = Paths(self.copies, self.combinations, self.scheduler, self.events, worthwhile=worthwhile)

    def _load_adapters(self, bank: AdapterBank, registry: AdapterRegistry) -> None:
        """Make what loads, checks and merges adapters."""
        base, config, pool = self.base, self.config, self.scheduler.pool
        smoke_tests = SmokeTests(self.scheduler, self.copies, base.spec.vocabulary_size)
        room = Room(base.context_length, config.block_size, pool.num_blocks, self.copies.budget)
        rules = AdapterRules(base.spec, adapter_limits(config, base.dtype), room, self.prompts.reading)
        self.adapters = AdapterManager(
            base.spec,
            AdapterStore(config.adapters, config.max_adapter_bytes),
            registry,
            bank,
            self.scheduler,
            self.background,
            smoke_tests,
            self.copies,
            self.prompts,
            rules,
            LoadMemory(min(config.loading_bytes, max(1, self.plan.adapters // 4))),
            self.events,
            self._forget,
        )
        most = min(base.context_length, pool.num_blocks * pool.block_size // 2)
        self.merging = MergeCommands(
            self.copies,
            registry,
            self.background,
            smoke_tests,
            lambda: not any(sequence.is_request for sequence in self.scheduler),
            [list(self.prompts.base.token_ids(text))[:most] for text in DEVIATION_TEXTS],
        )

    def _forget(self, adapter: Adapter) -> None:
        self.paths.forget(adapter)
        self.prompts.forget(adapter)
        self.copies.forget(adapter)
        self.combinations.forget(adapter)

    def finish_background(self) -> None:
        """Run background work, and the steps it needs, to its end."""
        self.background.wake_resting()
        while not self.background.idle:
            self.background.run_idle(float("inf"))
            if self.scheduler.has_work:
                self.step()
            else:
                self.adapters.collect()

    @property
    def has_work(self) -> bool:
        """Whether `step()` has anything to do."""
        return self.scheduler.has_work or not self.background.idle

    @property
    def occupancy(self) -> Occupancy:
        """What it holds now."""
        pool = self.scheduler.pool
        return Occupancy(
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            kv_blocks_used=pool.used,
            kv_blocks_cached=pool.idle,
            kv_blocks_total=pool.num_blocks,
            merged_copies=self.copies.count,
            merged_bytes=self.copies.bytes,
            merged_bytes_capacity=self.copies.budget,
            combinations=self.combinations.count,
            combined_bytes=self.combinations.bytes,
            combined_bytes_capacity=self.combinations.budget,
        )

    def add(self, prepared: GenerateSequence | ScoreJob) -> None:
        """Queue what `intake` has prepared. A score's continuations come out in one output."""
        if isinstance(prepared, ScoreJob):
            self._scoring.add(prepared)
        else:
            self.paths.queue(prepared)
            self._generating.add(prepared)

    def submit(self, request: Request | ScoreRequest) -> None:
        """Prepare and queue a request. Raises as `Intake.prepare` and `Intake.prepare_score`."""
        if request.id in self._generating or request.id in self._scoring:
            raise InvalidRequest("request_id", f"{request.id!r} is running already")
        if isinstance(request, ScoreRequest):
            self.add(self.intake.prepare_score(request))
        else:
            self.add(self.intake.prepare(request))

    def abort(self, request_id: str) -> list[RequestOutput]:
        """End a request and free what it holds; its last output, or nothing if it has ended already."""
        return self._generating.abort(request_id) + self._scoring.abort(request_id)

    def step(self) -> StepResult:
        """Advance every request that fits by one chunk or one token."""
        started = time.perf_counter()
        result = StepResult(outputs=self._generating.expire())
        if batch := self._schedule():
            logits = self.runner.run(batch)
            result.outputs += self._postprocess(batch, logits)
            seconds = time.perf_counter() - started
            if not batch.preempted:
                self.step_cost.observe(batch.work, seconds)
            result.stats = step_stats(batch, seconds, switched=self.runner.switched)
            self.background.run_after_step(result.stats.seconds)
        else:
            self.background.run_idle()
        result.outputs += self._generating.fail_lost() + self._scoring.fail_lost()
        return self.take_news(result)

    def take_news(self, result: StepResult) -> StepResult:
        """Free what nothing holds any more, and add to a result the news of adapters, their copies and the
        cache since the last call. Also for when no step has run, since a request may have been aborted."""
        self.adapters.collect()
        result.events += self.events
        self.events.clear()
        occupancy = self.occupancy
        if occupancy != self._told:
            result.occupancy = self._told = occupancy
        return result

    def _schedule(self) -> Batch | None:
        """The next batch; None if nothing can run, be it for want of a merged copy."""
        if not self.scheduler.has_work:
            return None
        self.paths.decide()
        batch = self.scheduler.schedule()
        if not batch.items:
            return None
        now = self.clock()
        for item in batch.items:
            item.sequence.on_scheduled(item.start, now)
        return batch

    def generate(self, requests: Iterable[Request | ScoreRequest]) -> list[list[RequestOutput]]:
        """Run requests to their ends, for notebooks and tests; the outputs of each, in its order."""
        outputs: dict[str, list[RequestOutput]] = {}
        for request in requests:
            self.submit(request)
            outputs[request.id] = []
        while not all(got and got[-1].terminal for got in outputs.values()):
            for output in self.step().outputs:
                if output.request_id in outputs:
                    outputs[output.request_id].append(output)
        return list(outputs.values())

    def _postprocess(self, batch: Batch, logits: torch.Tensor) -> list[RequestOutput]:
        """Tell the sequences what has run, and sample the next tokens."""
        completed: list[tuple[Sequence, int]] = []
        row = 0
        for item in batch.items:
            self.scheduler.advance(item)
            first, row = row, row + len(item.logit_rows)
            item.sequence.on_logits(logits[first:row])
            if item.completes:
                completed.append((item.sequence, row - 1))
        # All parts of the batch are taken note of: an end may now remove any sequence.
        end = StepEnd(self.scheduler.remove, self.scheduler.prefixes.adopt)
        for sequence, last in completed:
            sequence.on_complete(end, last)
        return end.outputs + self._generating.sample(end.sampling, logits)

    def check_integrity(self) -> None:
        """Raise AssertionError unless blocks, prefixes and pins add up."""
        self.scheduler.check_integrity()
        users: Counter[Hashable] = Counter(
            s.copy.adapter.generation
            for s in self.scheduler
            if s.copy is not None and s.path is LoraPath.MERGED
        )
        if self.paths.held is not None:
            users[self.paths.held.adapter.generation] += 1
        self.copies.check_integrity(users)
        self.combinations.check_integrity(
            Counter(s.stack.key for s in self.scheduler if s.combination is not None)
        )
        assert set(self._generating) <= set(self.scheduler)
