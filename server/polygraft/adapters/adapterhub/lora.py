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
from polygraft.adapters.files.reader import shown
from polygraft.core.primitives import LowRank, Scale

_TRAINING_ONLY = ("dropout", "init_weights", "init_weights_seed", "dtype")
_QKV = "qkv"
_COMPOSITIONS = ("add", "scale")


def compile_lora(source: Source, options: Options) -> Generator[None, None, Parts]:
    """Compile a method of the LoRA family; yields between modules. Problems are noted in the reader."""
    options.ignore(*_TRAINING_ONLY)
    settings = _Settings.take(source, options)
    attention = options.flag("selfattn_lora", True)
    others = options.flag("intermediate_lora") + options.flag("output_lora")
    left_out = options.layers_left_out()
    parts = Parts(settings.kind if settings else "lora")
    if settings is None:
        return parts
    modules = _Modules(source, settings)
    for layer in source.layers.layers:
        if layer.index in left_out:
            continue
        for module, is_fused in modules.of(layer, attention, others):
            yield
            if settings.kind == "ia3":
                scale = modules.scale(module, is_fused)
                if scale is not None:
                    parts.scales[module] = scale
                continue
            low_rank = modules.vera(module) if settings.kind == "vera" else modules.lora(module, is_fused)
            if low_rank is not None:
                parts.low_rank[module] = low_rank
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
    def take(cls, source: Source, options: Options) -> _Settings | None:
        """Take them from a block; None after noting a problem."""
        rank, alpha = options.take("r", int, 8), options.take("alpha", (int, float), 8)
        letters = options.take("attn_matrices", list, ["q", "v"])
        composition = options.take("composition_mode", str, "add")
        dora = options.flag("use_dora")
        # The library's own test for VeRA: either is a float.
        vera = [options.take(key, (int, float), None) for key in ("vera_d", "vera_b")]
        problems = source.reader.problems.total
        if not is_rank(rank) or not is_alpha(alpha):
            options.refuse("r", rank, f"makes no sense with alpha {shown(alpha)}")
        if composition not in _COMPOSITIONS:
            options.refuse("composition_mode", composition, "isn't known")
        if source.reader.problems.total > problems:
            return None
        if source.unscaled_lora:
            alpha = rank
        is_vera = any(isinstance(value, float) for value in vera)
        kind = "ia3" if composition == "scale" else "vera" if is_vera else "lora"
        if kind == "ia3" and (rank != 1 or dora or is_vera):
            options.refuse("composition_mode", composition, "goes with r 1, without use_dora and VeRA")
            return None
        if dora and alpha != rank:
            # The library takes the norms of W + B A and adds B A alpha / r.
            options.refuse("use_dora", dora, "isn't served unless alpha is r")
            return None
        scaling = float(alpha) if kind == "ia3" else alpha / rank
        return cls(kind, rank, scaling, tuple(letter for letter in _QKV if letter in letters), dora)


class _Modules:
    """The modules of one folder that have weights of this family."""

    def __init__(self, source: Source, settings: _Settings) -> None:
        self._source = source
        self._settings = settings
        mark = f".loras.{source.name}."
        self._adapted = {name.partition(mark)[0] for name in source.reader.names() if mark in name}
        self._shared: tuple[torch.Tensor, torch.Tensor] | None = None
        if settings.kind == "vera":
            self._shared = self._take_shared()

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

    def scale(self, module: str, is_fused: bool) -> Scale | None:
        """(IA)^3's factors for a module; None after noting a problem."""
        outputs = self._source.base.linears[module].out_features
        size = self._fused_size(module) if is_fused else outputs
        if size is None:
            return None
        b = self._take(module, "lora_B", size * (len(self._settings.letters) if is_fused else 1), 1)
        if b is None:
            return None
        factors = b.flatten()
        if is_fused:
            factors = torch.ones(outputs)
            for at, start in enumerate(self._starts(size)):
                factors[start : start + size] = b[at * size : (at + 1) * size, 0]
        factors *= self._settings.scaling
        if factors.isfinite().all():
            return Scale(output=factors, after_bias=True)
        self._source.reader.problems.append(f"alpha makes factors of {module} infinite")
        return None

    def lora(self, module: str, is_fused: bool) -> LowRank | None:
        """A module's low-rank weights; None after noting a problem."""
        if is_fused:
            return self._fused_lora(module)
        shape, rank = self._source.base.linears[module], self._settings.rank
        a = self._take(module, "lora_A", rank, shape.in_features)
        b = self._take(module, "lora_B", shape.out_features, rank)
        return self._low_rank(module, a, b)

    def _fused_lora(self, module: str) -> LowRank | None:
        shape, rank = self._source.base.linears[module], self._settings.rank
        parts = len(self._settings.letters)
        size = self._fused_size(module)
        if self._settings.dora or size is None:
            if self._settings.dora:
                problem = f"use_dora isn't served on {module}, which fuses queries, keys and values"
                self._source.reader.problems.append(problem)
            return None
        a = self._take(module, "lora_A", rank * parts, shape.in_features)
        b = self._take(module, "lora_B", size * parts, rank)
        if b is not None:
            wide = torch.zeros(shape.out_features, rank * parts)
            for at, start in enumerate(self._starts(size)):
                columns = slice(at * rank, (at + 1) * rank)
                wide[start : start + size, columns] = b[at * size : (at + 1) * size]
            b = wide
        return self._low_rank(module, a, b)

    def vera(self, module: str) -> LowRank | None:
        """A module's VeRA multiplied out; None after noting a problem."""
        reader, rank = self._source.reader, self._settings.rank
        shape = self._source.base.linears[module]
        if self._shared is None:
            return None
        a, b = self._shared
        if a.shape[1] != shape.in_features or b.shape[0] != shape.out_features:
            reader.problems.append(f"VeRA's shared matrices don't have the sizes of {module}")
            return None
        d_own = self._take(module, "vera_D", rank, rank)
        b_own = self._take(module, "vera_B", shape.out_features, shape.out_features)
        if d_own is None or b_own is None:
            return None
        if not reader.has_room(rank, rank * (shape.in_features + shape.out_features)):
            return None
        return self._low_rank(module, d_own @ a, b_own @ b)

    def _take_shared(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        prefix = self._source.layers.shared(f"shared_parameters.{self._source.name}.lora_")
        a = self._source.reader.take(f"{prefix}A", (self._settings.rank, None), wide=True)
        b = self._source.reader.take(f"{prefix}B", (None, self._settings.rank), wide=True)
        return None if a is None or b is None else (a, b)

    def _take(self, module: str, part: str, *shape: int) -> torch.Tensor | None:
        return self._source.reader.take(f"{module}.loras.{self._source.name}.{part}", shape, wide=True)

    def _low_rank(self, module: str, a: torch.Tensor | None, b: torch.Tensor | None) -> LowRank | None:
        reader, shape = self._source.reader, self._source.base.linears[module]
        magnitude = None
        if self._settings.dora:
            magnitude = self._take(module, "m.weight", shape.out_features, 1)
            if shape.has_bias:
                # The library multiplies the bias as well.
                reader.problems.append(f"use_dora isn't served on {module}, which has a bias")
                return None
        if a is None or b is None or (self._settings.dora and magnitude is None):
            return None
        kept_a = reader.keep(a, module)
        kept_b = reader.keep(b, module, scaling=self._settings.scaling)
        if kept_a is None or kept_b is None:
            return None
        return LowRank(
            kept_a,
            kept_b,
            magnitude=None if magnitude is None else magnitude.flatten(),
            scaling=self._settings.scaling,
        )

    def _fused_size(self, module: str) -> int | None:
        """Outputs of each of the three that a module is fused from; None after noting a problem."""
        outputs = self._source.base.linears[module].out_features
        if outputs % 3 == 0 and self._settings.letters:
            return outputs // 3
        self._source.reader.problems.append(
            f"{module} isn't fused from queries, keys and values of one size, or none of them is adapted"
        )
        return None

    def _starts(self, size: int) -> list[int]:
        """First outputs of those that are adapted."""
        return [_QKV.index(letter) * size for letter in self._settings.letters]
