"""Rows of the embedding and the head, resolved against the base's weights once, when an adapter is loaded.

What PEFT saves of either is often the whole of it, and mostly the base's own: after this an adapter holds the
rows that differ, and no others.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace

import torch
from torch import nn

from polygraft.core.adapter_weights import AdapterWeights, ModuleChange
from polygraft.core.primitives import TokenRows
from polygraft.errors import AdapterInvalid
from polygraft.layers.adapter_bank import AdapterBank


def resolve_token_rows(
    name: str, compiled: AdapterWeights, bank: AdapterBank
) -> Generator[None, None, AdapterWeights]:
    """An adapter that does the same, with at most one `TokenRows` for a module; yields between modules.

    Raises:
        AdapterInvalid: what the file gives as the base's own rows isn't.
    """
    base, table = bank.replaced.base, bank.replaced.table
    if not compiled.token_rows and compiled.embedding is None:
        return compiled
    if base.embedding is None or table is None or not table.is_understood():
        raise AdapterInvalid(name, ["the base's embedding does more than look up rows, which isn't served"])
    own: torch.Tensor = table.weight
    head = base.head or ""
    modules, embedding = dict(compiled.modules), compiled.embedding
    found: list[TokenRows] = []
    for module in (base.embedding.name, head):
        entries = [rows for rows in compiled.token_rows if module in rows.modules]
        if not entries:
            continue
        yield
        is_head = module == head
        weight = bank.modules.site(head).weight() if is_head and not base.tied else own
        yield
        ids, rows = _differing(name, module, entries, weight.to(own.dtype))
        own_rows = len(ids) > 0 or compiled.vocabulary is not None
        if is_head and own_rows:
            _check_head(name, head, compiled)
        one = modules[head].low_rank if head in modules else None
        if is_head and own_rows and one is not None:
            rows = (rows.float() + replace(one, b=one.b[ids]).product).to(rows.dtype)
            fitted = replace(one, b=_fitted(one.b, len(weight)))
            modules[head] = replace(modules[head], low_rank=fitted)
        elif not is_head and embedding is not None:
            rows = (rows.float() + replace(embedding, a=embedding.a[:, ids]).product.t()).to(rows.dtype)
            embedding = replace(embedding, a=_fitted(embedding.a.t(), len(weight)).t())
        found.append(TokenRows((module,), rows, ids))
    rows_of_all = tuple(_together(found, compiled.vocabulary or len(own)))
    return replace(compiled, modules=modules, embedding=embedding, token_rows=rows_of_all)


def _check_head(name: str, head: str, compiled: AdapterWeights) -> None:
    """Raise AdapterInvalid where something else of the adapter would have to know of the head's own rows."""
    change = compiled.modules.get(head, ModuleChange())
    low_rank = change.low_rank
    beside = {
        "use_dora": low_rank is not None and low_rank.magnitude is not None,
        "lora_bias": low_rank is not None and low_rank.bias is not None,
        "what is made of the base's weights": low_rank is not None
        and (low_rank.through_base or low_rank.of_base is not None),
        "a scale": change.scale is not None,
        "a Kronecker product": change.kron is not None,
        "a rotation": change.rotation is not None,
        "a dense change": change.dense is not None,
        "a bias": change.bias is not None,
    }
    found = [what for what, is_there in beside.items() if is_there]
    if found:
        raise AdapterInvalid(name, [f"{' and '.join(found)} on {head} isn't served with rows of its own"])


def _differing(
    name: str, module: str, entries: Sequence[TokenRows], base: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens of whose rows a module has others than the base's, ascending, and these rows."""
    known, dtype = len(base), base.dtype
    tokens, rows = torch.zeros(0, dtype=torch.long), base.new_zeros(0, base.shape[1]).cpu()
    for entry in entries:
        given = entry.weight.to(dtype)
        ids = torch.arange(len(given)) if entry.ids is None else entry.ids
        own = base[ids[ids < known].to(base.device)].cpu()
        same = torch.zeros(len(ids), dtype=torch.bool)
        same[: len(own)] = (given[: len(own)] == own).all(1)
        if entry.copied:
            # A file of a narrower type than the base's holds it rounded.
            rounded = own.to(entry.weight.dtype)
            wrong = int((~same[: len(own)] & (entry.weight[: len(own)] != rounded).any(1)).sum())
            if wrong:
                raise AdapterInvalid(
                    name,
                    [
                        f"it carries a copy of {module}, of which {wrong} of {len(own)} rows aren't the "
                        "base's: it was made for other weights"
                    ],
                )
            same[: len(own)] = True
        # A later entry's rows take the place of an earlier one's, those of the base's own among them.
        kept = ~torch.isin(tokens, ids)
        tokens, order = torch.cat([tokens[kept], ids[~same]]).sort()
        rows = torch.cat([rows[kept], given[~same]])[order]
    return tokens, rows


def _fitted(x: torch.Tensor, rows: int) -> torch.Tensor:
    """The first of some rows, or these and zeros."""
    return nn.functional.pad(x[:rows], (0, 0, 0, max(0, rows - len(x)))).contiguous()


def _together(found: list[TokenRows], vocabulary: int) -> list[TokenRows]:
    """What the embedding and the head share once, and nothing that is empty.

    Args:
        vocabulary: tokens that the adapter knows.
    """
    whole = [
        replace(rows, ids=None) if rows.ids is not None and len(rows.ids) == vocabulary else rows
        for rows in found
        if len(rows.weight)
    ]
    if len(whole) == 2:
        first, second = whole
        same = first.ids is second.ids is None or (
            first.ids is not None and second.ids is not None and torch.equal(first.ids, second.ids)
        )
        if same and torch.equal(first.weight, second.weight):
            return [replace(first, modules=first.modules + second.modules)]
    return whole
