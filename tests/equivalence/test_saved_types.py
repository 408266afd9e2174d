"""Files in bfloat16 and float16 with scalings that are no powers of two, by the rules of the matrix.

PEFT widens what such a file holds before it multiplies by the scaling. A scaling that is multiplied into a matrix
which is then rounded to the file's type gives other answers on a float32 base.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    DeftConfig,
    FourierFTConfig,
    GraloraConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeanutConfig,
    PeftConfig,
    PolyConfig,
    RandLoraConfig,
    SupertuningConfig,
    VeraConfig,
    WaveFTConfig,
)
from safetensors.torch import load_file, save_file

from polygraft_types.requests import AdapterRef, CombinationType
from tests.architectures import MATRIX
from tests.engines import forced_logits, merged_logits
from tests.equivalence.cases import (
    ALLOWANCE,
    BASE,
    TOLERANCE,
    Answers,
    Case,
    check_as_near_as_peft,
    check_exact,
    check_rows_differ,
    make_case,
    rms,
)
from tests.equivalence.reference import load_reference
from tests.peft_folders import CAUSAL, EMBEDDING, NO_CONV1D, NO_CONV1D_ALL, TARGETS, save_adapter
from tests.tiny import save_random_model

FILES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
STEPS = 4
LOUD = {"rslora", "rslora-loud"}
"""Their products are so large that random weights are made smaller."""


def configs(architecture: str) -> dict[str, PeftConfig]:
    """One adapter for each row but the base's: every kind that has a scaling."""
    targets, plain = TARGETS[architecture], NO_CONV1D[architecture]
    some = {"target_modules": targets, **CAUSAL}
    linear = {"target_modules": plain, **CAUSAL}
    return {
        "lora": LoraConfig(r=8, lora_alpha=20, target_modules="all-linear", **CAUSAL),
        "rslora": LoraConfig(r=32, lora_alpha=32, use_rslora=True, target_modules="all-linear", **CAUSAL),
        "rslora-loud": LoraConfig(
            r=32, lora_alpha=64, use_rslora=True, target_modules="all-linear", **CAUSAL
        ),
        "lora-bias": LoraConfig(r=8, lora_alpha=20, lora_bias=True, **some),
        "dora": LoraConfig(r=8, lora_alpha=20, use_dora=True, **some),
        "dora-rslora": LoraConfig(r=8, lora_alpha=20, use_rslora=True, use_dora=True, **some),
        "embedding": LoraConfig(
            r=8, lora_alpha=20, target_modules=[*targets, EMBEDDING[architecture], "lm_head"], **CAUSAL
        ),
        "adalora": AdaLoraConfig(init_r=6, lora_alpha=20, total_step=10, **some),
        "loha": LoHaConfig(r=3, alpha=5, **linear),
        "lokr": LoKrConfig(r=20, alpha=12, target_modules=NO_CONV1D_ALL[architecture], **CAUSAL),
        "lokr-products": LoKrConfig(r=3, alpha=5, decompose_both=True, decompose_factor=8, **linear),
        "gralora": GraloraConfig(r=4, gralora_k=2, hybrid_r=3, alpha=9, **some),
        "vera": VeraConfig(r=16, **some),
        "peanut": PeanutConfig(r=6, scaling=0.7, **linear),
        "deft": DeftConfig(r=4, alpha=6, **some),
        "poly": PolyConfig(r=3, n_skills=3, **linear),
        "fourierft": FourierFTConfig(n_frequency=70, scaling=61.0, **some),
        "waveft": WaveFTConfig(n_frequency=90, scaling=4.3, **some),
        "randlora": RandLoraConfig(r=10, randlora_alpha=27, **some),
        "supra": SupertuningConfig(sparsity=0.95, r=3, lora_alpha=5, **linear),
    }


ROWS = [BASE, *configs("llama")]
UNMERGEABLE = {BASE, "embedding"}
MERGED = [row for row in ROWS if row not in UNMERGEABLE]
COMBINED = ["lora", "lora-again"]
"""LoRAs of one rank and one set of modules, of which LINEAR combinations are made."""
WEIGHTS = (0.7, -0.45)
COMBINED_BEHIND = ["lora", "rslora", "dora", "loha", "vera", "deft"]
"""Rows whose prompts they are asked for."""


def prompt(row: str) -> list[int]:
    at = ROWS.index(row)
    generator = torch.Generator().manual_seed(at)
    return torch.randint(0, 250, (3 + 7 * at % 31,), generator=generator).tolist()


def save_as(folder: Path, dtype: torch.dtype, *, times: float = 1.0) -> None:
    """Save a folder's weights in another type, A and B made smaller before."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            tensors[name] = (tensor * (times if "lora_" in name else 1.0)).to(dtype)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def answers(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Answers]:
    @functools.cache
    def get(architecture: str, saved: str) -> Answers:
        store: Path = tmp_path_factory.mktemp(f"{architecture}-{saved}")
        folders = {**configs(architecture), "lora-again": configs(architecture)["lora"]}
        for seed, (row, config) in enumerate(folders.items()):
            save_adapter(store / row, tiny_model(architecture), architecture, config, seed)
            save_as(store / row, FILES[saved], times=0.5 if row in LOUD else 1.0)
        return Answers(tiny_model(architecture), store, {row: prompt(row) for row in ROWS}, STEPS)

    return get


@pytest.fixture(scope="module")
def case(answers: Callable[[str, str], Answers]) -> Callable[[str, str, str], Case]:
    return functools.cache(
        lambda architecture, saved, precision: make_case(answers(architecture, saved), precision)
    )


def cells(rows: list[str]) -> Iterator[Any]:
    """Every row in both types on a base without and on one with biases; half of them for every run."""
    for a, architecture in enumerate(("llama", "qwen2")):
        for s, saved in enumerate(FILES):
            for at, row in enumerate(rows):
                marks = () if (at + a + s) % 2 == 0 else pytest.mark.full
                yield pytest.param(architecture, saved, row, marks=marks)


@pytest.mark.parametrize(("architecture", "saved", "row"), list(cells(ROWS)))
def test_float32_gives_the_same_tokens(
    case: Callable[[str, str, str], Case], architecture: str, saved: str, row: str
) -> None:
    check_exact(case(architecture, saved, "float32"), row)


@pytest.mark.parametrize(("architecture", "saved", "row"), list(cells(MERGED)))
def test_a_merged_copy_gives_the_same(
    case: Callable[[str, str, str], Case], architecture: str, saved: str, row: str
) -> None:
    this = case(architecture, saved, "float32")
    logits = merged_logits(this.engine, this.prompts[row], row)
    assert (logits - this.exact[row].logits[0]).abs().max() < TOLERANCE


@pytest.mark.parametrize(("architecture", "saved", "row"), list(cells(ROWS)))
def test_bfloat16_is_as_near_as_peft(
    case: Callable[[str, str, str], Case], architecture: str, saved: str, row: str
) -> None:
    check_as_near_as_peft(case(architecture, saved, "bfloat16"), row)


@pytest.mark.parametrize("saved", FILES)
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_every_adapter_differs(case: Callable[[str, str, str], Case], architecture: str, saved: str) -> None:
    check_rows_differ(case(architecture, saved, "float32"))


@pytest.mark.parametrize(
    ("combined", "theirs"), [(CombinationType.LINEAR, "linear"), (CombinationType.STACK, "cat")]
)
@pytest.mark.parametrize("saved", FILES)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_several_with_weights(
    case: Callable[[str, str, str], Case],
    answers: Callable[[str, str], Answers],
    saved: str,
    precision: str,
    combined: CombinationType,
    theirs: str,
) -> None:
    engine = case("llama", saved, precision).engine
    prompts = [prompt(row) for row in COMBINED_BEHIND]

    def expected(precision: str) -> torch.Tensor:
        files = answers("llama", saved)
        model: Any = load_reference(files.model, files.store / COMBINED[0], precision)
        model.load_adapter(str(files.store / COMBINED[1]), COMBINED[1])
        names = ["default", COMBINED[1]]
        model.add_weighted_adapter(names, list(WEIGHTS), "both", combination_type=theirs)
        model.set_adapter("both")
        with torch.inference_mode():
            return torch.stack([model.eval()(torch.tensor([p])).logits[0, -1].float() for p in prompts])

    refs = tuple(AdapterRef(name, weight=weight) for name, weight in zip(COMBINED, WEIGHTS, strict=True))
    ours = forced_logits(engine, [(p, refs) for p in prompts], [combined] * len(prompts))
    exact = expected("float32")
    if precision == "float32":
        assert (ours - exact).abs().max() < TOLERANCE
    else:
        assert rms(ours - exact) <= ALLOWANCE * rms(expected(precision) - exact)


EXPERTS = {
    "experts": LoraConfig(
        r=3,
        lora_alpha=7,
        target_modules=["o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "experts.down_proj"],
        **CAUSAL,
    ),
    "rslora": LoraConfig(
        r=5,
        lora_alpha=5,
        use_rslora=True,
        target_modules=[],
        target_parameters=["experts.down_proj"],
        **CAUSAL,
    ),
    "routing": LoraConfig(
        r=3, lora_alpha=5, target_modules=["v_proj"], target_parameters=["mlp.gate.weight"], **CAUSAL
    ),
}


@pytest.mark.parametrize("saved", FILES)
def test_experts_and_routers(tmp_path: Path, saved: str) -> None:
    model = save_random_model(tmp_path / "model", "mixtral", dict(MATRIX["mixtral"].config), vectors=True)
    for seed, (row, config) in enumerate(EXPERTS.items()):
        save_adapter(tmp_path / "store" / row, model, "mixtral", config, seed)
        save_as(tmp_path / "store" / row, FILES[saved])
    prompts = {row: prompt("vera") for row in (BASE, *EXPERTS)}
    this = make_case(Answers(model, tmp_path / "store", prompts, STEPS), "float32")
    for row in prompts:
        check_exact(this, row)
    for row in EXPERTS:
        logits = merged_logits(this.engine, prompts[row], row)
        assert (logits - this.exact[row].logits[0]).abs().max() < TOLERANCE
    check_rows_differ(this)
