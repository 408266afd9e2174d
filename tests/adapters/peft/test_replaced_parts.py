"""What folders hold in the place of the base's own: tokens, embeddings, heads, norms and biases."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from polygraft.core.adapter_weights import AdapterWeights
from polygraft.core.spec import BaseSpec
from polygraft.errors import AdapterInvalid
from tests.adapters.specimen import Specimen, compile_folder
from tests.peft_folders import SOME_TOKENS
from tests.tiny import VOCABULARY

EMBED, HEAD = "base_model.model.model.embed_tokens", "base_model.model.lm_head"
DELTA = "token_adapter.trainable_tokens_delta"
Change = Callable[[Specimen], object]


def option(**values: Any) -> Change:
    return lambda s: s.config.update(values)


def tensors(**shapes: tuple[int, ...]) -> Change:
    """Random tensors of the embedding and the head, by the ends of their names."""

    def change(specimen: Specimen) -> None:
        for name, shape in shapes.items():
            where, _, end = name.partition("__")
            full = f"{EMBED if where == 'embed' else HEAD}.{end.replace('__', '.')}"
            specimen.tensors[full] = torch.randn(shape, generator=torch.Generator().manual_seed(len(name)))

    return change


TOKENS = f"token indices must be different ones in [0, {VOCABULARY}), got "
REFUSED: list[tuple[str, str, list[Change], list[str]]] = [
    ("lora-tokens", "no token", [option(trainable_token_indices=[])], [TOKENS + "[]"]),
    ("lora-tokens", "twice", [option(trainable_token_indices=[5, 5])], [TOKENS + "[5, 5]"]),
    ("lora-tokens", "negative", [option(trainable_token_indices=[-1])], [TOKENS + "[-1]"]),
    ("lora-tokens", "too large", [option(trainable_token_indices=[VOCABULARY])], [TOKENS + "[288]"]),
    ("lora-tokens", "a truth", [option(trainable_token_indices=[True])], [TOKENS + "[True]"]),
    ("lora-tokens", "text", [option(trainable_token_indices="5")],
     ["trainable_token_indices has the wrong type: '5'"]),
    ("lora-tokens", "a number", [option(trainable_token_indices={"embed_tokens": 5})], [TOKENS + "5"]),
    ("lora-tokens", "elsewhere", [option(trainable_token_indices={"q_proj": [5]})],
     ["trainable_token_indices: 'q_proj' is neither the embedding nor the head"]),
    ("lora-tokens", "named twice",
     [option(trainable_token_indices={"embed_tokens": SOME_TOKENS, "tokens": SOME_TOKENS})],
     ["trainable_token_indices: model.embed_tokens is named twice"]),
    ("lora-tokens", "fewer", [option(trainable_token_indices=SOME_TOKENS[1:])],
     [f"tensor {EMBED}.{DELTA} has shape [83, 64], expected [82, 64]"]),
    ("lora-tokens", "the tied head's differ", [tensors(**{f"head__{DELTA.replace('.', '__')}": (83, 64)})],
     [f"tensor {HEAD}.{DELTA} isn't what model.embed_tokens and lm_head share"]),
    ("lora-tokens-head", "tied", [option(ensure_weight_tying=True)],
     ["ensure_weight_tying, but the embedding and the head have other tokens"]),
    ("lora-tokens", "saved too", [option(modules_to_save=["lm_head"]), tensors(head__weight=(288, 64))],
     ["lm_head has trained tokens, and is adapted or saved as well"]),
    ("lora-embedding", "trained too",
     [option(trainable_token_indices=[1]), tensors(**{f"embed__{DELTA.replace('.', '__')}": (1, 64)})],
     ["model.embed_tokens has trained tokens, and is adapted or saved as well"]),
    ("trainable-tokens", "no tokens", [option(token_indices=None)], [TOKENS + "[]"]),
    ("trainable-tokens", "elsewhere", [option(target_modules=["embed_tokens", "q_proj"])],
     ["target model.layers.0.self_attn.q_proj has no rows for tokens"]),
    ("trainable-tokens", "the tied head's differ", [tensors(head__trainable_tokens_delta=(83, 64))],
     [f"tensor {HEAD}.trainable_tokens_delta isn't what model.embed_tokens and lm_head share"]),
    ("lora-embedding", "dora", [option(use_dora=True)], ["use_dora and lora_bias aren't served on model.embed"]),
    ("lora-embedding", "a bias", [option(lora_bias=True)], ["use_dora and lora_bias aren't served on model.embed"]),
    ("lora-embedding", "tokens without rows", [tensors(embed__lora_embedding_A=(4, 300))],
     [f"tensor {EMBED}.lora_embedding_A has shape [4, 300], expected [4, 288]"]),
    ("lora-embedding-head", "untied", [option(ensure_weight_tying=False)],
     [f"tensor {HEAD}.lora_A.weight isn't expected"]),
    ("lora-embedding", "tied", [option(ensure_weight_tying=True)], [f"tensor {HEAD}.lora_A.weight is missing"]),
    ("lora-saved-tokens", "said to be tied", [option(ensure_weight_tying=True)],
     ["ensure_weight_tying, but the embedding and the head differ"]),
    ("lora-saved-tokens", "saved twice, differing", [tensors(head__modules_to_save__weight=(288, 64))],
     [f"tensor {HEAD}.modules_to_save.weight isn't {HEAD}.weight"]),
    ("lora-saved-tokens", "two sizes", [tensors(head__weight=(300, 64), embed__weight=(310, 64))],
     ["the embedding and the head have rows for [300, 310] tokens"]),
    ("lora-saved-tokens", "one size and the base's", [tensors(head__weight=(300, 64))],
     [f"tensor {EMBED}.weight has shape [288, 64], expected [300, 64]"]),
    ("lora-saved-head", "larger alone", [tensors(head__weight=(300, 64))],
     ["it has 300 tokens, but no rows of model.embed_tokens for them"]),
    ("lora", "none at all", [tensors(embed__weight=(0, 64))], ["it has no tokens"]),
    ("lora", "two copies", [tensors(embed__weight=(288, 64), head__weight=(288, 64))],
     [f"tensor {HEAD}.weight isn't what model.embed_tokens and lm_head share"]),
    ("lora", "a copy of another width", [tensors(embed__weight=(288, 32))],
     [f"tensor {EMBED}.weight has shape [288, 32], expected [288, 64]"]),
    ("lora", "a tuner's copy twice", [tensors(embed__weight=(288, 64), embed__base_layer__weight=(288, 64))],
     [f"tensor {EMBED}.base_layer.weight isn't what model.embed_tokens and lm_head share"]),
    ("ln-tuning", "linear", [option(target_modules=["norm", "q_proj"])],
     ["target model.layers.0.self_attn.q_proj is no norm, which this kind is served on alone"]),
    ("lora-saved-norms", "activated", [option(alora_invocation_tokens=[1])],
     ["alora_invocation_tokens with parts of the base that it replaces"]),
    ("lora-embedding", "activated", [option(alora_invocation_tokens=[1])],
     ["alora_invocation_tokens with parts of the base that it replaces"]),
    ("shira", "saved", [option(modules_to_save=["lm_head"]), tensors(head__weight=(288, 64))],
     ["shira is served merged only, and tokens of its own can't be merged"]),
    ("prompt", "saved", [option(modules_to_save=["norm"])], ["modules_to_save=['norm'] isn't served: this kind"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "changes", "expected"),
    [(k, c, e) for k, _, c, e in REFUSED],
    ids=[f"{r[0]}-{r[1]}" for r in REFUSED],
)
def test_what_is_refused(
    specimen: Callable[[str], Specimen],
    spec: BaseSpec,
    tmp_path: Path,
    kind: str,
    changes: list[Change],
    expected: list[str],
) -> None:
    damaged = specimen(kind)
    for change in changes:
        change(damaged)
    with pytest.raises(AdapterInvalid) as caught:
        compile_folder(damaged.save(tmp_path / "a"), spec)
    for text in expected:
        assert any(problem.startswith(text) for problem in caught.value.problems), caught.value.problems


def compiled_after(specimen: Specimen, spec: BaseSpec, folder: Path, *changes: Change) -> AdapterWeights:
    for change in changes:
        change(specimen)
    return compile_folder(specimen.save(folder), spec)


def test_equal_saved_modules_are_kept_once(
    specimen: Callable[[str], Specimen], spec: BaseSpec, tmp_path: Path
) -> None:
    saved = specimen("lora-saved-tokens")
    apart = compile_folder(saved.save(tmp_path / "apart"), spec)
    saved.tensors[f"{EMBED}.weight"] = saved.tensors[f"{HEAD}.weight"].clone()
    together = compile_folder(saved.save(tmp_path / "together"), spec)
    assert [rows.modules for rows in together.token_rows] == [("model.embed_tokens", "lm_head")]
    assert apart.compiled_bytes - together.compiled_bytes == VOCABULARY * 64 * 4


def test_tokens_are_sorted(specimen: Callable[[str], Specimen], spec: BaseSpec, tmp_path: Path) -> None:
    trained = specimen("lora-tokens")
    weight = trained.tensors[f"{EMBED}.{DELTA}"]
    trained.config["trainable_token_indices"] = SOME_TOKENS[::-1]
    (rows,) = compile_folder(trained.save(tmp_path / "a"), spec).token_rows
    assert rows.ids is not None
    assert rows.ids.tolist() == SOME_TOKENS
    assert torch.equal(rows.weight, weight.flip(0))


def test_an_adapter_is_merged_only_if_all_of_it_folds(
    specimen: Callable[[str], Specimen], spec: BaseSpec, tmp_path: Path
) -> None:
    def why(kind: str) -> tuple[bool, str]:
        compiled = compile_folder(specimen(kind).save(tmp_path / kind), spec)
        return compiled.mergeable, compiled.unmergeable

    assert why("dora-biases") == (True, "")
    assert why("ln-tuning") == (False, "norms of its own")
    assert why("lora-saved-head") == (False, "tokens of its own")
    assert why("lora-embedding") == (False, "low-rank weights on the embedding")
