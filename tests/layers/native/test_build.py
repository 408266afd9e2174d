"""Building the C++ operators, and going without them."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from polygraft.layers.native import build, kernels
from tests.engines import greedy, make_engine, run_greedy

COMPILER = pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="no C++ compiler")


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A machine that has built nothing yet; where it would put the library."""
    package = tmp_path / "package"
    package.mkdir()
    for source in (*build.FOLDER.glob("*.cpp"), *build.FOLDER.glob("*.h")):
        (package / source.name).write_bytes(source.read_bytes())
    monkeypatch.setattr(build, "FOLDER", package)
    monkeypatch.setenv("POLYGRAFT_CACHE", str(tmp_path / "cache"))
    kernels.load_kernels.cache_clear()
    yield tmp_path / "cache" / "kernels"
    kernels.load_kernels.cache_clear()


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_without_a_compiler_there_is_a_warning_and_torch_serves(
    fresh: Path,
    llama: Path,
    llama_store: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    requests = [
        greedy(str(name), list(range(40)), name, 6) for name in (None, "lora-bias", "prefix", "prompt")
    ]
    expected = run_greedy(make_engine(llama, llama_store, native=False), requests)
    # What loading that base built.
    shutil.rmtree(fresh)
    kernels.load_kernels.cache_clear()
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    engine = make_engine(llama, llama_store)
    assert kernels.load_kernels() is None
    assert "torch's operators serve, which are slower: there is no C++ compiler" in caplog.text
    assert run_greedy(engine, requests) == expected


@COMPILER
def test_a_compiler_that_fails(fresh: Path, caplog: pytest.LogCaptureFixture) -> None:
    (build.FOLDER / "kernels.cpp").write_text("this is no C++\n")
    assert kernels.load_kernels() is None
    assert "the C++ operators don't compile" in caplog.text
    assert "this" in caplog.text
    assert files(fresh) == []


def test_a_compiler_that_says_much_is_quoted_briefly(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiler = tmp_path / "wordy-c++"
    compiler.write_text(
        "#!/bin/sh\necho 'In file x:' >&2\nyes 'x.cpp:1:1: error: wrong' | head -n 300 >&2\nexit 1\n"
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with caplog.at_level("INFO", "polygraft.layers.native.build"):
        assert build.load() is None
    shown = [record.getMessage() for record in caplog.records if "error: wrong" in record.getMessage()]
    assert shown
    assert all(message.endswith(": x.cpp:1:1: error: wrong") for message in shown)


def test_a_cache_folder_that_cant_be_written(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fresh.parent.write_text("a file where the folder should be")
    monkeypatch.setattr(build.shutil, "which", lambda name: "/usr/bin/g++")
    assert kernels.load_kernels() is None
    assert "torch's operators serve, which are slower" in caplog.text


def test_a_library_that_cant_be_loaded(fresh: Path, caplog: pytest.LogCaptureFixture) -> None:
    fresh.mkdir(parents=True)
    (fresh / build.library_name(build.instruction_sets()[0])).write_bytes(b"half a library")
    assert kernels.load_kernels() is None
    assert "torch's operators serve, which are slower" in caplog.text


def test_the_name_changes_with_source_flags_and_instruction_set(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {build.library_name(march) for march in ("", "x86-64-v3", "x86-64-v4")}
    assert len(names) == 3
    header = build.FOLDER / "linear.h"
    header.write_text(header.read_text() + "\n// changed\n")
    names.add(build.library_name(""))
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-g"))
    names.add(build.library_name(""))
    assert len(names) == 5


@pytest.mark.parametrize(
    ("vectors", "extensions", "expected"),
    [
        (
            "AVX512",
            ["avx512_vnni", "avx512_bf16"],
            ["x86-64-v4+avx512vnni+avx512bf16", "x86-64-v4+avx512vnni", "x86-64-v4", "x86-64-v3", ""],
        ),
        ("AVX512", ["avx512_vnni"], ["x86-64-v4+avx512vnni", "x86-64-v4", "x86-64-v3", ""]),
        ("AVX512", ["avx_vnni"], ["x86-64-v4", "x86-64-v3+avxvnni", "x86-64-v3", ""]),
        ("AVX512_VNNI", [], ["x86-64-v4", "x86-64-v3", ""]),
        ("AVX2", ["avx_vnni"], ["x86-64-v3+avxvnni", "x86-64-v3", ""]),
        ("AVX2", [], ["x86-64-v3", ""]),
        ("DEFAULT", [], [""]),
    ],
)
def test_the_best_instruction_set_comes_first(
    vectors: str, extensions: list[str], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: vectors)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(extensions, True))
    assert build.instruction_sets() == expected


@COMPILER
@pytest.mark.parametrize("march", build.LEVELS)
def test_every_instruction_set_compiles(march: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Nothing is loaded here, so the quickest will do.
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-fsyntax-only"))
    monkeypatch.setattr(Path, "replace", lambda self, target: target)
    build.build(march, tmp_path)


def test_a_compiler_that_doesnt_know_the_newest(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "compiler")
    monkeypatch.setattr(build, "instruction_sets", lambda: ["x86-64-v4+avx512vnni", "x86-64-v3", ""])
    monkeypatch.setattr(build.ctypes, "CDLL", lambda path: path)

    def compile_old(command: list[str], **options: Any) -> None:
        if "-mavx512vnni" in command:
            raise subprocess.CalledProcessError(1, command, stderr="unrecognized option")
        assert "-march=x86-64-v3" in command
        Path(command[command.index("-o") + 1]).write_bytes(b"x")

    monkeypatch.setattr(subprocess, "run", compile_old)
    assert build.load() == str(fresh / build.library_name("x86-64-v3"))


@pytest.mark.parametrize("interrupted", [False, True])
def test_the_library_appears_whole_or_not_at_all(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, interrupted: bool
) -> None:
    monkeypatch.setenv("CXX", "compiler")
    seen: list[list[str]] = []

    def compile_slowly(command: list[str], **options: Any) -> None:
        output = Path(command[command.index("-o") + 1])
        output.write_bytes(b"half")
        seen.append([name for name in files(fresh) if name.endswith(".so")])
        if interrupted:
            raise KeyboardInterrupt
        output.write_bytes(b"half and half")

    monkeypatch.setattr(subprocess, "run", compile_slowly)
    if interrupted:
        with pytest.raises(KeyboardInterrupt):
            build.build("x86-64-v3", fresh)
        assert files(fresh) == []
    else:
        path = build.build("x86-64-v3", fresh)
        assert files(fresh) == [path.name]
        assert path.read_bytes() == b"half and half"
    assert seen == [[]]


@COMPILER
def test_what_is_built_is_used_again(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build.load() is not None
    assert len(files(fresh)) == 1
    monkeypatch.setattr(build, "build", None)
    assert build.load() is not None


def test_a_library_beside_the_package_comes_first(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = build.library_name(build.instruction_sets()[0])
    for folder in (fresh, build.FOLDER):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    monkeypatch.setattr(build.ctypes, "CDLL", lambda path: path)
    assert build.load() == str(build.FOLDER / name)
