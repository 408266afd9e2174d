"""LoRA (arXiv 2106.09685) and rsLoRA (2312.03732) as PEFT saves them, compiled to LowRank.

PEFT computes `result + lora_B(lora_A(x)) * scaling` (peft/tuners/lora/layer.py, Linear.forward) with
scaling = alpha / r, or alpha / sqrt(r) with `use_rslora`; `lora_bias` is lora_B's own bias, so it is scaled
as well. QLoRA (2305.14314) is the same on a base with its weights in nf4. An activated LoRA (2504.12397) acts
from the last occurrence of its invocation tokens in the prompt on (peft/tuners/lora/variants.py,
calculate_alora_offsets).
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace

from polygraft.adapters.files.problems import OptionProblem, Problem
from polygraft.adapters.files.reader import FolderReader
from polygraft.adapters.files.shown import shown
from polygraft.adapters.kind import side_path
from polygraft.adapters.peft.module import TargetModule
from polygraft.adapters.peft.module_kind import ModuleKind
from polygraft.adapters.peft.per_module import RankAndAlpha, paired, scaling_of
from polygraft.adapters.peft.target_parameters import TargetParameters
from polygraft.adapters.peft.targets import find_targets, with_tied_head
from polygraft.adapters.peft.trainable_tokens import take_trainable_tokens
from polygraft.core.adapter_weights import AdapterWeights, LoraSettings, ModuleChange
from polygraft.core.primitives import LowRank
from polygraft.core.spec import BaseSpec

# Initialisations that leave the base alone (peft/tuners/lora/layer.py, update_layer). The others (pissa,
# pissa_niter_N, olora, corda, lora_ga, loftq) move part of the base's weights into the adapter, which is then
# wrong on the base as it was.
_OF_MODULES = {"orthogonal", "mica"}
_PLAIN_INITS = {None, True, False, "gaussian", "eva", *_OF_MODULES}
TRAINING_ONLY = (
    "lora_dropout", "fan_in_fan_out", "eva_config", "corda_config", "lora_ga_config", "loftq_config",
    "megatron_config", "megatron_core", "runtime_config", "qalora_group_size",
)  # fmt: skip
"""Options of LoRA, and of the kinds whose configuration extends it, that only training reads."""
UNSERVED = (
    "arrow_config", "kasa_config", "layer_replication", "monteclora_config", "use_bdlora", "use_qalora",
    "velora_config",
)  # fmt: skip
"""Options of the same kinds that change what is computed, and that aren't served."""


class Lora(ModuleKind):
    """Low-rank matrices beside the base's weights, of linear modules, the embedding, experts and routers."""

    peft_type = "LORA"
    title = "LoRA, rsLoRA"
    paper = "2106.09685"
    rows = (
        side_path(),
        side_path(
            "low-rank side path inside the experts' product",
            "rank × rows × experts of a row; a small matrix for a router",
            where="with `target_parameters`",
        ),
        side_path(
            "low-rank side path, and a scale of outputs",
            "rank × rows, and a product for each output",
            where="with `use_dora` (DoRA)",
        ),
        side_path(
            "low-rank side path from its invocation on; cached prefixes are the base's own",
            where="with `alora_invocation_tokens` (activated LoRA)",
        ),
    )
    training_only = TRAINING_ONLY
    unserved = UNSERVED
    ties = True
    trains_biases = True

    def __init__(self, reader: FolderReader, base: BaseSpec) -> None:
        super().__init__(reader, base)
        self._settings = RankAndAlpha(reader, "lora_alpha")
        self._rslora = reader.option("use_rslora", bool, False)
        self._has_bias = reader.option("lora_bias", bool, False)
        self._dora = reader.option("use_dora", bool, False)
        self._invocation = reader.option("alora_invocation_tokens", list, [])
        self._init = reader.option("init_lora_weights", (bool, str), True)
        self._parameters = TargetParameters(reader, base, self._settings, rslora=self._rslora)
        self._embedding = None if base.embedding is None else base.embedding.name
        self._table: LowRank | None = None
        self._scalings: dict[str, float] = {}
        if self._parameters.given:
            self._parameters.refuse_with(
                use_dora=self._dora,
                lora_bias=self._has_bias,
                alora_invocation_tokens=bool(self._invocation),
                init_lora_weights=self._init in _OF_MODULES,
            )

    def targets(self) -> Sequence[str]:
        """Return the linear modules to compile, and take the trained tokens."""
        also = [] if self._embedding is None else [self._embedding]
        self._found = find_targets(self.reader, self.base, also, required=not self._parameters.given)
        self._adapted = with_tied_head(self.reader, self.base, self._found.modules)
        self._token_rows = take_trainable_tokens(self.reader, self.base, self._adapted)
        return [name for name in self._adapted if name != self._embedding]

    def begin(self, targets: Sequence[str]) -> None:
        """Check the options."""
        _check_init(self._init)
        if self._dora and self._has_bias:
            raise OptionProblem("lora_bias with use_dora has no meaning in PEFT")
        if self._dora and self._invocation:
            raise OptionProblem("alora_invocation_tokens with use_dora has no meaning in PEFT")
        for token in self._invocation:
            known = isinstance(token, int) and not isinstance(token, bool)
            if not known or not 0 <= token < self.base.vocabulary_size:
                raise OptionProblem(
                    f"alora_invocation_tokens holds {shown(token)}, which is no token of the base"
                )

    def change(self, module: TargetModule) -> ModuleChange:
        """Return a linear module's matrices, bias and magnitude."""
        rank, alpha = self._settings.of(module.name)
        scaling = self._scalings[module.name] = scaling_of(rank, alpha, rslora=self._rslora)
        a, b, *others = module.take_all(
            ("lora_A.weight", (rank, module.inputs)),
            ("lora_B.weight", (module.outputs, rank)),
            *([("lora_B.bias", (module.outputs,))] if self._has_bias else []),
            *([("lora_magnitude_vector", (module.outputs,))] if self._dora else []),
            wide=False,
        )
        bias = others[0].float() * scaling if self._has_bias else None
        magnitude = others[0] if self._dora else None
        a, b = paired(module.name, a, b, scaling, bias)
        return ModuleChange(LowRank(a, b, bias, magnitude, scaling=scaling))

    def others(self) -> Generator[None, None, Mapping[str, ModuleChange]]:
        """Compile the embedding's matrices, and return the routers' ones."""
        if self._embedding is not None and self._embedding in self._adapted:
            yield
            with self.reader.noting(f"{self.prefix}{self._embedding}.", inner=True):
                self._table = self._take_table(self._embedding)
        return (yield from self._parameters.take())

    def _take_table(self, name: str) -> LowRank:
        """Take the matrices of the embedding. Raises Problem."""
        if self._dora or self._has_bias:
            raise Problem(f"use_dora and lora_bias aren't served on {name}, an embedding")
        rank, alpha = self._settings.of(name)
        scaling = self._scalings[name] = scaling_of(rank, alpha, rslora=self._rslora)
        a, b = self.reader.take_all(
            [
                (f"{self.prefix}{name}.lora_embedding_A", (rank, self.base.vocabulary_size)),
                (f"{self.prefix}{name}.lora_embedding_B", (self.base.hidden_size, rank)),
            ]
        )
        return LowRank(*paired(name, a, b, scaling), scaling=scaling)

    def weights(self, modules: Mapping[str, ModuleChange]) -> AdapterWeights:
        """Return the adapter, with the parts that aren't of linear modules."""
        adapted = self._embedding if self._embedding in self._scalings else None
        return replace(
            super().weights(modules),
            embedding=self._table,
            experts=self._parameters.experts,
            token_rows=self._token_rows,
            invocation=tuple(self._invocation),
            lora=LoraSettings(
                self._settings.largest_rank,
                self._rslora,
                self._scalings,
                self._found,
                adapted,
                tied=self.reader.ties and adapted is not None,
                has_parameters=self._parameters.given,
            ),
        )


def _check_init(init: object) -> None:
    """Raise OptionProblem for what was trained on other base weights than the ones that are served."""
    if init in _PLAIN_INITS:
        return
    if init == "loftq":
        # PEFT's conversion doesn't know it.
        remedy = "train it after replace_lora_weights_loftq instead, which leaves them alone"
    else:
        remedy = "save it with path_initial_model_for_weight_conversion, which turns it into a plain LoRA"
    raise OptionProblem(f"init_lora_weights={init!r} changes the base's weights; {remedy}")
