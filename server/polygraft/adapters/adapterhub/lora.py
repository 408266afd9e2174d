"""AdapterHub's LoRA (arXiv 2106.09685), (IA)^3 (2205.05638), VeRA (2310.11454) and DoRA (2402.09353),
compiled to LowRank and Scale.

LoRA adds `B A x alpha / r`; (IA)^3 multiplies an output, its bias included, by `B alpha`; VeRA adds
`(b B) (d A) x alpha / r` with matrices b and d of each module's own (adapters/methods/lora.py). A projection
that gives queries, keys and values together has one A and one B for each of the three that is adapted, one
below the other (LoRAMergedLinear). Which feed-forward module an option means differs by model: on Llama the
"intermediate" one is down_proj. So the names of the tensors decide.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch

from polygraft.adapters.adapterhub.layers import Layer
from polygraft.adapters.adapterhub.options import Options
from polygraft.adapters.adapterhub.source import Parts, Source
from polygraft.adapters.files.numbers import is_alpha, is_rank
from polygraft.adapters.files.problems import Problem
from polygraft.adapters.files.reader import Shape
from polygraft.adapters.files.shown import shown
from polygraft.core.adapter_weights import ModuleChange
from polygraft.core.primitives import LowRank, Scale

_TRAINING_ONLY = ("dropout", "init_weights", "init_weights_seed", "dtype")
_QKV = "qkv"
_COMPOSITIONS = ("add", "scale")


def compile_lora(source: Source, options: Options) -> Generator[None, None, Parts]:
    """Compile a method of the LoRA family; yields between modules. Raises OptionProblem."""
    options.ignore(*_TRAINING_ONLY)
    settings = _Settings.take(source, options)
    attention = options.flag("selfattn_lora", True)
    others = options.flag("intermediate_lora") + options.flag("output_lora")
    left_out = options.layers_left_out()
    parts = Parts(settings.kind)
    modules = _Modules(source, settings)
    for layer in source.layers.layers:
        if layer.index in left_out:
            continue
        for module, is_fused in modules.of(layer, attention, others):
            yield
            with source.reader.noting(f"{module}.", inner=True):
                parts.modules[module] = modules.change(module, is_fused)
    return parts


@dataclass(frozen=True, slots=True)
class _Settings:
    """The options that all modules of a method share.

    Args:
        letters: which of q, k and v are adapted, in that order.
        scaling: of what is added, or of (IA)^3's factors.
        dora: whether rows are brought to norms that were learnt.
    """

    kind: str
    rank: int
    scaling: float
    letters: tuple[str, ...]
    dora: bool

    @classmethod
    def take(cls, source: Source, options: Options) -> _Settings:
        """Take them from a block. Raises OptionProblem."""
        rank, alpha = options.take("r", int, 8), options.take("alpha", (int, float), 8)
        letters = options.take("attn_matrices", list, ["q", "v"])
        composition = options.take("composition_mode", str, "add")
        dora = options.flag("use_dora")
        # The library's own test for VeRA: either is a float.
        vera = [options.take(key, (int, float), None) for key in ("vera_d", "vera_b")]
        if not is_rank(rank) or not is_alpha(alpha):
            raise options.problem("r", rank, f"isn't valid with alpha {shown(alpha)}")
        if composition not in _COMPOSITIONS:
            raise options.problem("composition_mode", composition, "isn't known")
        if source.unscaled_lora:
            alpha = rank
        is_vera = any(isinstance(value, float) for value in vera)
        kind = "ia3" if composition == "scale" else "vera" if is_vera else "lora"
        if kind == "ia3" and (rank != 1 or dora or is_vera):
            raise options.problem("composition_mode", composition, "goes with r 1, without use_dora and VeRA")
        if dora and alpha != rank:
            # The library takes the norms of W + B A and adds B A alpha / r.
            raise options.problem("use_dora", dora, "isn't served unless alpha is r")
        scaling = float(alpha) if kind == "ia3" else alpha / rank
        return cls(kind, rank, scaling, tuple(letter for letter in _QKV if letter in letters), dora)


class _Modules:
    """The modules of one folder that have weights of this family."""

    def __init__(self, source: Source, settings: _Settings) -> None:
        self._source = source
        self._settings = settings
        mark = f".loras.{source.name}."
        self._adapted = {name.partition(mark)[0] for name in source.reader.names() if mark in name}
        self._shared: list[torch.Tensor] = []

    def of(self, layer: Layer, attention: bool, others: int) -> list[tuple[str, bool]]:
        """Names of a layer's adapted modules, and whether each is fused from queries, keys and values."""
        found = [(name, False) for name in self._separate(layer)]
        in_attention = f"{layer.attention}."
        adapted = sorted(name for name in self._adapted if name.startswith(f"{layer.name}."))
        if not attention:
            found = []
        elif not self._is_separate(layer):
            fused = [name for name in adapted if name.startswith(in_attention)]
            found = [(name, True) for name in fused]
            self._check_number(layer, "fused modules of its attention", fused, 1)
        rest = [name for name in adapted if not name.startswith(in_attention)]
        self._check_number(layer, "modules outside its attention", rest, others)
        found += [(name, False) for name in rest]
        unknown = [name for name, _ in found if name not in self._source.base.linears]
        self._source.reader.problems += [f"{name} is no linear module of the base" for name in unknown]
        return [(name, is_fused) for name, is_fused in found if name not in unknown]

    def _is_separate(self, layer: Layer) -> bool:
        return all(f"{layer.attention}.{letter}_proj" in self._source.base.linears for letter in _QKV)

    def _separate(self, layer: Layer) -> Sequence[str]:
        return [f"{layer.attention}.{letter}_proj" for letter in self._settings.letters]

    def _check_number(self, layer: Layer, what: str, found: list[str], expected: int) -> None:
        if len(found) != expected:
            self._source.reader.problems.append(
                f"{layer.name} has weights for {len(found)} {what}, the configuration asks for {expected}"
            )

    def change(self, module: str, is_fused: bool) -> ModuleChange:
        """Return what the folder changes about a module. Raises Problem."""
        if self._settings.kind == "ia3":
            return ModuleChange(scale=self._scale(module, is_fused))
        if self._settings.kind == "vera":
            return ModuleChange(self._vera(module))
        return ModuleChange(self._fused_lora(module) if is_fused else self._lora(module))

    def _scale(self, module: str, is_fused: bool) -> Scale:
        """Return (IA)^3's factors."""
        outputs = self._source.base.linears[module].out_features
        size = self._fused_size(module) if is_fused else outputs
        rows = size * (len(self._settings.letters) if is_fused else 1)
        (b,) = self._take(module, ("lora_B", (rows, 1)))
        factors = b.flatten()
        if is_fused:
            factors = torch.ones(outputs)
            for at, start in enumerate(self._starts(size)):
                factors[start : start + size] = b[at * size : (at + 1) * size, 0]
        factors *= self._settings.scaling
        if not factors.isfinite().all():
            raise Problem(f"alpha makes factors of {module} infinite")
        return Scale(output=factors, after_bias=True)

    def _lora(self, module: str) -> LowRank:
        """Return a module's low-rank weights."""
        shape, rank = self._source.base.linears[module], self._settings.rank
        a, b = self._take(
            module, ("lora_A", (rank, shape.in_features)), ("lora_B", (shape.out_features, rank))
        )
        return self._low_rank(module, a, b)

    def _fused_lora(self, module: str) -> LowRank:
        """Return the low-rank weights of a module that fuses queries, keys and values."""
        shape, rank = self._source.base.linears[module], self._settings.rank
        parts = len(self._settings.letters)
        if self._settings.dora:
            raise Problem(f"use_dora isn't served on {module}, which fuses queries, keys and values")
        size = self._fused_size(module)
        a, b = self._take(
            module, ("lora_A", (rank * parts, shape.in_features)), ("lora_B", (size * parts, rank))
        )
        wide = torch.zeros(shape.out_features, rank * parts)
        for at, start in enumerate(self._starts(size)):
            columns = slice(at * rank, (at + 1) * rank)
            wide[start : start + size, columns] = b[at * size : (at + 1) * size]
        return self._low_rank(module, a, wide)

    def _vera(self, module: str) -> LowRank:
        """Return a module's VeRA multiplied out."""
        rank, shape = self._settings.rank, self._source.base.linears[module]
        outputs = shape.out_features
        d_own, b_own = self._take(module, ("vera_D", (rank, rank)), ("vera_B", (outputs, outputs)))
        if not self._shared:
            prefix = self._source.layers.shared(f"shared_parameters.{self._source.name}.lora_")
            self._shared = self._source.reader.take_all(
                [(f"{prefix}A", (rank, None)), (f"{prefix}B", (None, rank))], wide=True
            )
        a, b = self._shared
        if a.shape[1] != shape.in_features or b.shape[0] != shape.out_features:
            raise Problem(f"VeRA's shared matrices don't have the sizes of {module}")
        self._source.reader.need_room(rank, rank * (shape.in_features + outputs))
        return self._low_rank(module, d_own @ a, b_own @ b)

    def _take(self, module: str, *parts: tuple[str, Shape]) -> list[torch.Tensor]:
        prefix = f"{module}.loras.{self._source.name}."
        return self._source.reader.take_all([(prefix + part, shape) for part, shape in parts], wide=True)

    def _low_rank(self, module: str, a: torch.Tensor, b: torch.Tensor) -> LowRank:
        reader, shape = self._source.reader, self._source.base.linears[module]
        magnitude, scaling = None, self._settings.scaling
        if self._settings.dora:
            (magnitude,) = self._take(module, ("m.weight", (shape.out_features, 1)))
            magnitude = magnitude.flatten()
            if shape.has_bias:
                # The library multiplies the bias as well.
                raise Problem(f"use_dora isn't served on {module}, which has a bias")
        kept_a, kept_b = reader.keep(a, module), reader.keep(b, module, scaling=scaling)
        return LowRank(kept_a, kept_b, magnitude=magnitude, scaling=scaling)

    def _fused_size(self, module: str) -> int:
        """Return the outputs of each of the three that a module is fused from. Raises Problem."""
        outputs = self._source.base.linears[module].out_features
        if outputs % 3 == 0 and self._settings.letters:
            return outputs // 3
        raise Problem(
            f"{module} isn't fused from queries, keys and values of one size, or none of them is adapted"
        )

    def _starts(self, size: int) -> list[int]:
        """Return the first outputs of those that are adapted."""
        return [_QKV.index(letter) * size for letter in self._settings.letters]
