"""Builds and loads the C++ operators.

A wheel or an image may carry prebuilt libraries beside this file (`python -m
polygraft.layers.native.build --here`); otherwise the compiler at hand builds one into the user's cache
directory, once for each source and instruction set.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from polygraft.core.cache_dir import cache_dir
from polygraft.errors import ConfigError
from polygraft.stages import reminders

log = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
# -fno-math-errno and -fno-trapping-math let loops over floor and select become vector code; unlike
# -ffast-math they keep NaN and infinity, which smoke tests look for.
FLAGS = ("-O3", "-std=c++17", "-fopenmp", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math")
LEVELS: dict[str, tuple[str, ...]] = {
    "x86-64-v4+avx512vnni+avx512bf16": ("AVX512", "avx512_vnni", "avx512_bf16"),
    "x86-64-v4+avx512vnni": ("AVX512", "avx512_vnni"),
    "x86-64-v4": ("AVX512",),
    "x86-64-v3+avxvnni": ("AVX2", "avx_vnni"),
    "x86-64-v3": ("AVX2",),
}
"""The best first: `-march` and what is on beside it, with torch's names of the vectors and of the rest."""


def instruction_sets() -> list[str]:
    """What of `LEVELS` this machine can run, then "", the compiler's default."""
    # torch must come first in any case: the library shares the OpenMP runtime that torch has loaded.
    import torch

    if platform.machine() not in {"x86_64", "AMD64"}:
        return [""]
    best, extensions = torch.backends.cpu.get_cpu_capability(), torch.cpu.get_capabilities()
    vectors = ["AVX512", "AVX2"] if best.startswith("AVX512") else [best]
    return [
        *(
            name
            for name, (needed, *beside) in LEVELS.items()
            if needed in vectors and all(extensions.get(extension) for extension in beside)
        ),
        "",
    ]


def torch_openmp() -> list[Path]:
    """GNU's OpenMP runtime inside torch's wheel; empty where torch uses the system's."""
    import torch

    return sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))


def library_name(march: str) -> str:
    """File name of the library for one instruction set; changes with the source and the flags."""
    sources = b"".join(path.read_bytes() for path in sorted((*FOLDER.glob("*.cpp"), *FOLDER.glob("*.h"))))
    digest = hashlib.sha256(sources + " ".join(FLAGS).encode()).hexdigest()[:12]
    return f"kernels-{march or platform.machine()}-{digest}.so"


def build(march: str, folder: Path) -> Path:
    """Compile for one instruction set into a folder.

    Raises:
        OSError: no compiler, or the folder can't be written.
        subprocess.CalledProcessError: the compiler failed; `stderr` holds its words.
    """
    compiler = _compiler()
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / library_name(march)
    # Compiled aside and moved into place, so that nobody loads half a file.
    with tempfile.TemporaryDirectory(dir=folder) as aside:
        output = Path(aside) / target.name
        level, *beside = march.split("+")
        arch = [f"-march={level}"] * bool(level) + [f"-m{extension}" for extension in beside]
        # The OpenMP runtime that torch has loaded, under whatever name its wheel gave it: a second one
        # would bring a second set of threads. The compiler's own is left out where nothing needs it.
        runtime = ["-Wl,--as-needed", *map(str, torch_openmp())]
        subprocess.run(  # noqa: S603 - the compiler that the user's environment names
            [compiler, *FLAGS, "-Wno-psabi", *arch, "-o", str(output), str(FOLDER / "kernels.cpp"), *runtime],
            check=True,
            capture_output=True,
            text=True,
        )
        output.replace(target)
    return target


def _compiler() -> str:
    """The C++ compiler's name; raises OSError if there is none."""
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    if found is None:
        raise FileNotFoundError("there is no C++ compiler (g++, c++, clang++, or what CXX names)")
    return found


def load() -> ctypes.CDLL | None:
    """The operators' library, built first if need be; None where none can be had, with a warning."""
    levels = instruction_sets()
    try:
        for march in levels:
            for folder in (FOLDER, cache_dir() / "kernels"):
                path = folder / library_name(march)
                if path.is_file():
                    return ctypes.CDLL(str(path))
        return ctypes.CDLL(str(_build_best(levels)))
    except subprocess.CalledProcessError as error:
        log.warning(
            "the C++ operators don't compile, so torch's operators serve, which are slower: %s",
            _complaint(error),
        )
    except (OSError, ConfigError) as error:
        log.warning(
            "the C++ operators can't be built, so torch's operators serve, which are slower: %s",
            error,
        )
    return None


def _build_best(levels: Sequence[str]) -> Path:
    """For the best instruction set that the compiler knows: an old one doesn't know the newest."""
    folder = cache_dir() / "kernels"
    _compiler()  # its absence is all that needs saying
    log.info("compiling the C++ operators for this processor, once, into %s", folder)
    started = time.monotonic()
    *better, last = levels
    with reminders("compiling", lambda text: log.info("C++ operators: %s", text)):
        for march in better:
            try:
                library = build(march, folder)
                break
            except subprocess.CalledProcessError as error:
                log.info("the compiler has no support for %s: %s", march, _complaint(error))
        else:
            library = build(last, folder)
    log.info("compiled the C++ operators in %.1f s", time.monotonic() - started)
    return library


def _complaint(error: subprocess.CalledProcessError) -> str:
    """The compiler's first error. It may write thousands of lines, which are logged for debugging only."""
    log.debug("the compiler's whole output: %s", error.stderr.strip())
    lines = [line.strip() for line in error.stderr.splitlines() if line.strip()]
    return next(
        (line for line in lines if "error" in line), lines[0] if lines else f"status {error.returncode}"
    )


def main() -> None:
    """Build ahead of the first start."""
    parser = argparse.ArgumentParser(description="Build the C++ operators.")
    parser.add_argument(
        "--here", action="store_true", help="for every instruction set, into the package itself"
    )
    if parser.parse_args().here:
        for march in LEVELS if platform.machine() in {"x86_64", "AMD64"} else [""]:
            print(build(march, FOLDER).name)  # noqa: T201 - a command's output
    elif load() is None:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
