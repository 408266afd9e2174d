"""Reads a folder's tokenizer in a worker, and tries it before the server gets it.

The server builds its tokenizer from what this returns, not from the folder's files: one JSON, exactly as it
was tried.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from tokenizers import Tokenizer

from polygraft.base.tokenizer import TextTokenizer, contained
from polygraft.engine.sandbox.frames import Frame
from polygraft.engine.sandbox.parts import needs_worker, parts_of, problems_of
from polygraft.engine.tokenizers.adapter_tokenizer import read_tokenizer
from polygraft.engine.tokenizers.text_stream import TextStream
from polygraft.errors import AdapterInvalid
from polygraft.printable import printable

PROBES = (
    "", " ", "a", "\0", "\n\t\r\n", "Hello, world! 1234 times.", "naïve Straße 日本語 🙂 e\u0301",
    "اَلْعَرَبِيَّة ไทย", "\ufffd\u200d\ufeff", "def f(x):\n\treturn [x]*3  # why?",
    "<|im_start|>user\n<s>[INST] hi [/INST]</s>",
)  # fmt: skip
"""Texts of the usual kinds."""
_RUNS = ("a", " ", "1", "\n", ".", "é", "日", "ab1 .\n")
_RUN_CHARACTERS = 2000
"""Long runs reveal quadratic time, or worse."""
_IDS_AT_ONCE = 1024
_MOST_SPECIAL_TOKENS = 2**14
_MOST_SAID = 2**18
"""Limit in characters of all special tokens, which are passed with every chat."""


def read_and_try(files: Mapping[str, bytes], base: Mapping[str, Any]) -> Frame:
    """The tokenizer of these files: its JSON as `core`, and what the other files say; or what is wrong with
    it.

    Args:
        base: the parts of the base's own tokenizer, see `parts_of`.
    """
    try:
        read = read_tokenizer("", files)
    except AdapterInvalid as error:
        return _invalid([printable(problem) for problem in error.problems])
    try:
        core = read.backend.to_str()
        tokenizer = Tokenizer.from_str(core)
        special = sorted(token.content for token in tokenizer.get_added_tokens_decoder().values())
        if len(special) > _MOST_SPECIAL_TOKENS:
            return _invalid([f"it has {len(special)} added tokens, the limit is {_MOST_SPECIAL_TOKENS}"])
        own = parts_of(tokenizer)
        problems = problems_of(own, dict(base))
        said = sum(len(str(text)) for text in read.special_tokens.values())
        if said > _MOST_SAID:
            problems.append(f"its special tokens have {said} characters, the limit is {_MOST_SAID}")
        if problems:
            return _invalid(problems)
        failures = try_out(replace(read, backend=tokenizer), special)
    except Exception as error:  # noqa: BLE001 - tokenizers raises bare Exception
        return _invalid([f"its tokenizer can't be used: {printable(str(error))}"])
    warnings = [f"its tokenizer fails on some texts, which are refused: {failures[0]}"] if failures else []
    header = {
        "special_tokens": dict(read.special_tokens),
        "chat_templates": dict(read.chat_templates),
        "needs_worker": needs_worker(own, dict(base)),
        "warnings": warnings,
    }
    return Frame(header, {"core": core.encode()})


def try_out(tokenizer: TextTokenizer, special: Sequence[str]) -> list[str]:
    """Encode and decode texts of many kinds and every token; returns what fails.

    The server survives an error or a panic. What it wouldn't survive, such as an abort, ends this process.
    """
    failures: list[str] = []
    runs = (run * (_RUN_CHARACTERS // len(run)) for run in _RUNS)
    chunks = ("".join(special[at : at + 256]) for at in range(0, len(special), 256))
    for text in (*PROBES, *runs, *chunks):
        for adds in (True, False):
            _try(failures, partial(_there_and_back, tokenizer.backend, text, adds))
    known = sorted(tokenizer.backend.get_vocab(with_added_tokens=True).values())
    for at in range(0, len(known), _IDS_AT_ONCE):
        some = known[at : at + _IDS_AT_ONCE]
        _try(failures, partial(tokenizer.backend.decode, some, skip_special_tokens=False))
        _try(failures, partial(_stream, tokenizer, some))
    return failures


def _there_and_back(backend: Tokenizer, text: str, special: bool) -> None:
    [found] = backend.encode_batch_fast([text], add_special_tokens=special)
    backend.decode_batch([found.ids], skip_special_tokens=not special)


def _stream(tokenizer: TextTokenizer, ids: Sequence[int]) -> None:
    """Decode like an answer: token by token after the prompt's last tokens."""
    stream = TextStream(tokenizer, ids[:8], ())
    for token in ids[8:24]:
        stream.push(token)


def _try(failures: list[str], call: Callable[[], object]) -> None:
    try:
        contained(call)
    except ValueError as error:
        failures.append(printable(str(error)))


def _invalid(problems: list[str]) -> Frame:
    return Frame({"failed": "invalid", "problems": problems[:20]})
