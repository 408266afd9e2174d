"""What ends an answer: all that a folder names, whatever of it equals the base's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from polygraft.adapters.files.folder import AdapterFolder
from polygraft.base.loader import load_base
from polygraft.engine.prompts.adapter_prompts import AdapterPrompts
from polygraft.engine.prompts.prompts import Prompts
from polygraft.errors import AdapterInvalid
from polygraft_types.answers import FinishReason
from polygraft_types.requests import AdapterRef, Request, SamplingParams, StoppingParams
from tests.engines import make_engine
from tests.tiny import EOS, VOCABULARY, byte_tokenizer

IM_END = 258


def chatml_base(llama: Path, folder: Path) -> Path:
    """A base model whose tokenizer has ChatML's tokens and whose answers don't end in them."""
    base = shutil.copytree(llama, folder)
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_end|>", "<|eot|>"]})
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == IM_END
    tokenizer.save_pretrained(base)
    return base


@pytest.fixture(scope="module")
def base(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chatml_base(tiny_model("llama"), tmp_path_factory.mktemp("chatml") / "base")


@pytest.fixture(scope="module")
def prompts(base: Path) -> AdapterPrompts:
    return AdapterPrompts(load_base(str(base)))


def read(prompts: AdapterPrompts, **files: object) -> Prompts | None:
    """What a folder with these files brings along."""
    texts = {
        file.replace("__", "."): content if isinstance(content, bytes) else json.dumps(content).encode()
        for file, content in files.items()
    }
    return prompts.read(AdapterFolder("adapter", {}, b"", "", texts))


def ends(prompts: AdapterPrompts, **files: object) -> tuple[int, ...]:
    found = read(prompts, **files)
    assert found is not None
    return found.eos_token_ids


def test_the_usual_chatml_recipe_ends_its_turn(base: Path, llama_store: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama_store / "lora", tmp_path / "store" / "chatml")
    shutil.copy(base / "tokenizer.json", folder)
    config = json.loads((base / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": "<|im_end|>"}))
    engine = make_engine(base, tmp_path / "store")
    info = engine.adapters.registry.get("chatml")
    assert info.own_prompts
    request = Request(
        "chatml",
        "hello",
        (AdapterRef("chatml"),),
        sampling=SamplingParams(logit_bias=((IM_END, 1000.0),)),
        stopping=StoppingParams(max_new_tokens=20),
    )
    [outputs] = engine.generate([request])
    finished = outputs[-1].finished
    assert finished is not None
    assert (finished.reason, finished.stop_token_id) == (FinishReason.STOP, IM_END)


@pytest.mark.parametrize(
    ("files", "more"),
    [
        ({"tokenizer_config__json": {"eos_token": "<|im_end|>"}}, [258]),
        ({"tokenizer_config__json": {"eos_token": {"__type": "AddedToken", "content": "<|im_end|>"}}}, [258]),
        ({"tokenizer_config__json": {"eos_token": "<eos>", "eot_token": "<|eot|>"}}, [259]),
        ({"special_tokens_map__json": {"eos_token": "<|eot|>"}}, [259]),
        ({"special_tokens_map__json": {"eos_token": {"content": "<|eot|>", "lstrip": False}}}, [259]),
        ({"generation_config__json": {"eos_token_id": 258}}, [258]),
        ({"generation_config__json": {"eos_token_id": [256, 258, 259]}}, [258, 259]),
        (
            {
                "tokenizer_config__json": {"eos_token": "<|im_end|>"},
                "special_tokens_map__json": {"eos_token": "<|eot|>"},
                "generation_config__json": {"eos_token_id": [65]},
            },
            [65, 258, 259],
        ),
    ],
)
@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_every_file_counts(
    prompts: AdapterPrompts, base: Path, files: Mapping[str, object], more: list[int], with_tokenizer: bool
) -> None:
    if with_tokenizer:
        files = {**files, "tokenizer__json": (base / "tokenizer.json").read_bytes()}
    assert ends(prompts, **files) == (EOS, *more)


def test_an_end_without_an_embedding_is_left_out(prompts: AdapterPrompts) -> None:
    """It can't be generated, and no logit is there to be masked."""
    assert ends(prompts, generation_config__json={"eos_token_id": [258, VOCABULARY]}) == (EOS, 258)


def test_what_says_nothing_new_is_the_bases(prompts: AdapterPrompts, base: Path) -> None:
    assert read(prompts) is None
    assert read(prompts, generation_config__json={"eos_token_id": 256, "temperature": 0.3}) is None
    whole = {file: (base / file).read_bytes() for file in ("tokenizer.json", "tokenizer_config.json")}
    assert read(prompts, **{file.replace(".", "__"): content for file, content in whole.items()}) is None


def test_an_end_that_the_tokenizer_does_not_know_is_told(prompts: AdapterPrompts) -> None:
    found = read(
        prompts,
        tokenizer_config__json={"added_tokens_decoder": {}},
        special_tokens_map__json={"eos_token": "<|nowhere|>"},
    )
    assert found is not None
    assert found.warnings == (
        "special_tokens_map.json names '<|nowhere|>' as an end, which its tokenizer doesn't know",
    )


@pytest.mark.parametrize("ids", ["<|im_end|>", [1, "2"], -1, True, 1.5, {"id": 1}])
def test_ends_that_are_no_ids(prompts: AdapterPrompts, ids: object) -> None:
    with pytest.raises(AdapterInvalid, match=r"generation_config\.json: eos_token_id must be"):
        read(prompts, generation_config__json={"eos_token_id": ids})


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b"[" * 100_000])
@pytest.mark.parametrize(
    "file", ["tokenizer_config__json", "special_tokens_map__json", "generation_config__json"]
)
def test_files_that_cannot_be_read(prompts: AdapterPrompts, file: str, content: bytes) -> None:
    with pytest.raises(AdapterInvalid, match=file.replace("__", ".")):
        read(prompts, **{file: content})


@pytest.mark.parametrize(
    ("file", "change", "more"),
    [
        ("generation_config.json", {"eos_token_id": [256, 65]}, [65]),
        ("config.json", {"eos_token_id": 66}, [66]),
        ("tokenizer_config.json", {"eos_token": "<|im_end|>"}, [258]),
        ("tokenizer_config.json", {"eot_token": "<|eot|>"}, [259]),
        ("special_tokens_map.json", {"eos_token": {"content": "<|eot|>"}}, [259]),
    ],
)
def test_the_bases_folder_counts_as_well(
    base: Path, tmp_path: Path, file: str, change: Mapping[str, object], more: list[int]
) -> None:
    folder = shutil.copytree(base, tmp_path / "base")
    content = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    (folder / file).write_text(json.dumps({**content, **change}))
    assert set(load_base(str(folder)).eos_token_ids) == {EOS, *more}


def test_a_bases_end_without_a_logit_is_left_out(base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(base, tmp_path / "base")
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "eos_token_id": [EOS, -1, VOCABULARY]}))
    assert Prompts.of_base(load_base(str(folder))).eos_token_ids == (EOS,)


def test_an_architectures_default_is_nobodys_word(base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(base, tmp_path / "base")
    content = json.loads((folder / "config.json").read_text())
    del content["eos_token_id"]  # Llama's configuration then has 2
    (folder / "config.json").write_text(json.dumps(content))
    assert load_base(str(folder)).eos_token_ids == (EOS,)
