"""Side paths of modules: any number of adapters and ranks in one step.

A step's rows lie grouped by adapter, so an adapter's rows are one segment `[first, last)` and the work is
`out[segment] += weight * scaling * (x[segment] @ A.T) @ B.T` for each. Weights are never copied or padded: a
module's table holds the address and rank of each slot's weights, so the cost grows with the rows and ranks in
the step (Punica's segments, arXiv 2310.18547; S-LoRA's unpadded ranks, arXiv 2311.03285). Rows of several
adapters are in several segments.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from polygraft.core.adapter_weights import ModuleChange
from polygraft.core.primitives import Dense, LowRank, Scale
from polygraft.layers.linear.packed_adapter import PackedAdapter
from polygraft.layers.linear.panels import pack
from polygraft.layers.native.kernels import DTYPES, WEIGHT_DTYPES
from polygraft.layers.native.structures import (
    A_IN_PANELS,
    ENTRY,
    SCALES_SUM,
    EntryStruct,
    GroupStruct,
    ModuleStruct,
    as_int64,
)
from polygraft.layers.operators import Operators
from polygraft.layers.step import Segment, Segments, StepContext


class LowRankSlots:
    """One module's low-rank weights, Kronecker products, scales and rotations by slot.

    Args:
        index: the module's bit in `Segments.touched`.
        panel: columns in a panel of B, and ranks in one of A where there are so many; 0 keeps both in one.
        device: where weights and table are kept.
        base_bias: the module's own, [out_features] or None.
        bias_inside: whether what is scaled has that bias in it already.
        rotated_inputs: inputs that the C++ operator rotates itself, 0 where it is given the base's product.
    """

    def __init__(
        self,
        index: int,
        panel: int,
        device: torch.device,
        base_bias: torch.Tensor | None = None,
        *,
        bias_inside: bool = True,
        rotated_inputs: int = 0,
    ) -> None:
        self.index = index
        self._panel = panel
        self._device = device
        self._base_bias = base_bias
        self._bias_inside = bias_inside
        self._rotated_inputs = rotated_inputs
        self._struct = ModuleStruct()
        self._table = torch.zeros(0, ENTRY, dtype=torch.int64)
        self._weights: dict[int, PackedAdapter] = {}
        self._dense: dict[int, Dense] = {}

    def bind(self, struct: ModuleStruct) -> None:
        """Keep the table's address up to date where the C++ operator reads it."""
        self._struct = struct
        struct.table = self._table.data_ptr()

    def move(self, table: torch.Tensor) -> None:
        """Take over a table int64 [slots, ENTRY] that holds what the last one did."""
        self._table = table
        self._struct.table = table.data_ptr()

    @property
    def base_bias(self) -> torch.Tensor | None:
        """The module's own, float32 [out_features] or None, where adapters' weights are made."""
        return None if self._base_bias is None else self._base_bias.detach().float().cpu()

    @property
    def table(self) -> torch.Tensor:
        """int64 [slots, ENTRY], as native/side_path.h's `Entry` has it."""
        return self._table

    def pack(self, change: ModuleChange) -> PackedAdapter:
        """Return an adapter's change of the module as the operators read it."""
        primitive, scale, kron, rotation = change.low_rank, change.scale, change.kron, change.rotation
        own_bias = change.bias
        a = b = bias = out_scale = None
        if primitive is not None:
            assert not primitive.needs_base, "to be resolved against the base's weights first"
            width = primitive.b.shape[0]
            panel = self._panel or width
            b = nn.functional.pad(primitive.b.to(self._device), (0, 0, 0, -width % panel))
            b = b.view(b.shape[0] // panel, panel, primitive.rank).transpose(1, 2)
            a, bias = self._packed_a(primitive.a.to(self._device)), primitive.bias
        if own_bias is not None:
            assert scale is None or not scale.after_bias, "no kind scales a bias of its own"
            assert self._base_bias is not None
            more = own_bias.float() - self._base_bias.detach().float().to(own_bias.device)
            bias = more if bias is None else bias.float() + more.to(bias.device)
        if scale is not None and scale.output is not None:
            bias = self._with_scaled_bias(bias, scale)
            out_scale = self._padded(scale.output)
        in_scale = None if scale is None or scale.input is None else self._kept(scale.input)
        return PackedAdapter(
            a,
            b,
            None if bias is None else self._padded(bias),
            in_scale,
            out_scale,
            None if kron is None else self._kept(kron.w1),
            None if kron is None else self._kept(kron.w2.t()),
            None if rotation is None else self._kept(rotation.blocks),
            1.0 if primitive is None else primitive.scaling,
            scale is not None and scale.of_sum,
        )

    def _packed_a(self, a: torch.Tensor) -> torch.Tensor:
        """In panels where it fills them, which are multiplied like the base's own weights; else as it is."""
        rank, inputs = a.shape
        if self._panel and rank and rank % self._panel == 0 and inputs % 2 == 0 and a.dtype in DTYPES:
            return pack(a, self._panel)
        return a

    def _kept(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self._device).float().contiguous()

    def _padded(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.pad(x.to(self._device).float(), (0, -len(x) % (self._panel or len(x))))

    def _with_scaled_bias(self, bias: torch.Tensor | None, scale: Scale) -> torch.Tensor | None:
        """The adapter's bias, with what the scale must do, or must not have done, to the base's own."""
        if self._base_bias is None or self._bias_inside == scale.after_bias:
            return bias
        assert scale.output is not None
        own = self._base_bias.detach().float().to(scale.output.device)
        more = own * (scale.output.float() - 1) * (1 if scale.after_bias else -1)
        return more if bias is None else bias.float() + more

    def scratch(self, packed: PackedAdapter) -> int:
        """Numbers that the C++ operator keeps for a row: x A^T, half a Kronecker product, a rotated input."""
        rotated = 0 if packed.rotation is None else self._rotated_inputs
        return packed.rank + packed.between + rotated

    def install(self, slot: int, packed: PackedAdapter) -> None:
        """Put an adapter's weights into a slot; contiguous, and not to be moved."""
        self._weights[slot] = packed
        i2, o2 = (0, 0) if packed.w2 is None else packed.w2.shape
        blocks, size, _ = (0, 0, 0) if packed.rotation is None else packed.rotation.shape
        entry = EntryStruct(
            a=_address(packed.a),
            b=_address(packed.b),
            bias=_address(packed.bias),
            rank=packed.rank,
            dtype=0 if packed.a is None else WEIGHT_DTYPES.get(packed.a.dtype, -1),
            in_scale=_address(packed.in_scale),
            out_scale=_address(packed.out_scale),
            w1=_address(packed.w1),
            w2=_address(packed.w2),
            o2=o2,
            i2=i2,
            rotation=_address(packed.rotation),
            rotation_size=size,
            rotation_step=size * size if blocks > 1 else 0,
            flags=packed.a_in_panels * A_IN_PANELS | packed.scales_sum * SCALES_SUM,
            scaling=packed.scaling,
        )
        self._table[slot] = as_int64(entry)

    def install_dense(self, slot: int, change: Dense) -> None:
        """Put what is only ever folded into the weight into a slot; its tensors are on the slots' device."""
        self._dense[slot] = change

    def dense(self, slot: int) -> Dense | None:
        """What is only ever folded into the weight; None for a slot that has none."""
        return self._dense.get(slot)

    def bias(self, slot: int) -> torch.Tensor | None:
        """What an adapter adds to every row, float32 [columns of all panels]."""
        return self._weights[slot].bias

    def low_rank(self, slot: int, outputs: int) -> LowRank:
        """An adapter's A and B, of so many outputs."""
        return self._weights[slot].low_rank(outputs)

    def fold(self, slot: int, weight: torch.Tensor) -> torch.Tensor:
        """The module's weight [out_features, in_features] with an adapter in it, float32."""
        if slot in self._dense:
            return self._dense[slot].fold(weight.to(torch.float32, copy=True), 0)
        return self._weights[slot].folded(weight)

    def fold_bias(self, slot: int, bias: torch.Tensor | None) -> torch.Tensor | None:
        """The module's bias with an adapter in it, [out_features], for one that isn't added separately."""
        if slot in self._dense:
            return self._dense[slot].fold_bias(None if bias is None else bias.float())
        packed = self._weights[slot]
        if bias is not None and packed.out_scale is not None:
            bias = bias.float() * packed.out_scale[: len(bias)]
        if packed.bias is None:
            return bias
        return packed.bias if bias is None else bias.float() + packed.bias[: len(bias)]

    def remove(self, slot: int) -> None:
        """Empty a slot; no step that uses it may be running."""
        self._dense.pop(slot, None)
        if self._weights.pop(slot, None) is not None:
            self._table[slot] = 0

    def transform_inputs(self, x: torch.Tensor, segments: Segments) -> torch.Tensor:
        """x [..., rows, in_features], with the rows of adapters that scale or rotate them so."""
        changes = [
            (segment, packed)
            for segment in segments.host
            if (packed := self._weights.get(segment.slot)) is not None and packed.transforms
        ]
        if changes:
            x = x.clone()
            for (first, last, *_), packed in changes:
                x[..., first:last, :] = packed.transformed(x[..., first:last, :].float()).to(x.dtype)
        return x

    def add_krons(self, x: torch.Tensor, out: torch.Tensor, segments: Sequence[Segment]) -> None:
        """Add Kronecker products to out [rows, out_features], for the operators that leave them to torch."""
        for first, last, slot, weight, _ in segments:
            packed = self._weights.get(slot)
            if packed is not None and packed.w1 is not None:
                added = packed.kron_product(x[first:last].float(), out.shape[-1])
                out[first:last] = (out[first:last].float() + weight * added).to(out.dtype)

    def add_torch(self, x: torch.Tensor, out: torch.Tensor, segments: Segments) -> None:
        """The operator in torch: scales out [rows, out_features], and adds the side paths of x [rows, in]."""
        for first, last, slot, weight, _ in segments.host:
            packed = self._weights.get(slot)
            if packed is not None:
                out[first:last] = packed.applied(x[first:last].float(), out[first:last], weight).to(out.dtype)


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class AdaptedLinear(nn.Module):
    """A linear module of any make with the side paths of the step's adapters.

    Rows without an adapter, and steps without an adapter that has weights here, run the base alone.

    Args:
        base_layer: a module that maps [..., in_features] to [..., out_features], untouched.
        is_head: it sees only the rows whose logits are computed.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        slots: LowRankSlots,
        step: StepContext,
        is_head: bool,
        operators: Operators,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.slots = slots
        self.step = step
        self.is_head = is_head
        self._kernels = operators.kernels
        self._triton = operators.triton
        self._struct = GroupStruct(modules=1)
        self._out = ctypes.c_void_p()
        slots.bind(self._struct.module[0])
        # In a tuple, so that torch doesn't take it for a part of the model.
        self._instead: tuple[nn.Module, ...] = ()

    def use(self, layer: nn.Module | None) -> None:
        """Run this layer from here on, None being the base's own."""
        self._instead = () if layer is None else (layer,)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., rows, in_features] to [..., rows, out_features]."""
        layer = self._instead[0] if self._instead else self.base_layer
        segments = self.step.head_segments if self.is_head else self.step.segments
        touched = segments.touched >> self.slots.index & 1
        out: torch.Tensor = layer(self.slots.transform_inputs(x, segments) if touched else x)
        if touched:
            out = self._add(x, out.contiguous(), segments)
        return out

    def _add(self, x: torch.Tensor, out: torch.Tensor, segments: Segments) -> torch.Tensor:
        if self._triton is not None and x.dtype in WEIGHT_DTYPES and out.dtype in (x.dtype, torch.float32):
            rows = x.reshape(-1, x.shape[-1]).contiguous()
            for tiles, host in segments.depths:
                self._triton.add(
                    rows, out.view(-1, out.shape[-1]), self.slots.table, tiles, segments.max_rank
                )
                self.slots.add_krons(rows, out.view(-1, out.shape[-1]), host)
            return out
        dtype, out_dtype = DTYPES.get(x.dtype), DTYPES.get(out.dtype)
        known = dtype is not None and out_dtype in (dtype, DTYPES[torch.float32])
        if self._kernels is None or not known:
            self.slots.add_torch(x.reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1]), segments)
            return out
        x = x.contiguous()
        self._struct.in_features, self._struct.module[0].width = x.shape[-1], out.shape[-1]
        self._out.value = out.data_ptr()
        self._kernels.linear(
            dtype, out_dtype, ctypes.addressof(self._struct), x.data_ptr(), x.shape[:-1].numel(),
            ctypes.addressof(self._out), segments.table.data_ptr(), len(segments.host),
            self.step.scratch.data_ptr(), segments.max_rank, torch.get_num_threads(),
        )  # fmt: skip
        return out

    def __getattr__(self, name: str) -> Any:
        """The base layer's own attributes, for model code that reads `module.weight` and the like."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)
