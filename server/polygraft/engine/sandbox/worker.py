"""A worker's main module, run by `python -m`. It answers questions on its standard input, one at a time.

It holds no secrets, since it has only the environment that `process.py` gives it, and it bounds its own
memory and the time of each answer. Whatever a file does to Jinja, Python's compiler or the tokenizers library
stays in this process. It ends when its standard input does, that is with the server.

Arguments: most bytes of memory beyond what the process starts with.
"""

from __future__ import annotations

import os
import sys
from array import array
from collections import OrderedDict
from collections.abc import Callable

import jinja2.sandbox  # noqa: F401 - imported before memory is bounded and time counts
from tokenizers import Tokenizer

from polygraft.engine.sandbox import template
from polygraft.engine.sandbox.frames import MAX_HEADER_BYTES, BadFrame, Frame, pack, read
from polygraft.engine.sandbox.limits import limit_memory, limit_process, limited_time
from polygraft.panics import is_panic
from polygraft.printable import printable

MAX_BODY_BYTES = 2**28
_KEPT_TOKENIZERS = 4
_MOST_RESIDENT_KIB = 2**18
"""A worker that has grown beyond this ends after its answer; its successor starts small."""


def main(arguments: list[str]) -> int:
    """Answer until the input ends. Returns the exit status."""
    limit_process()
    limit_memory(int(arguments[0]))
    questions, answers = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # nothing may print into the answers
    worker = Worker()
    while True:
        try:
            question = read(questions.read, MAX_HEADER_BYTES, MAX_BODY_BYTES)
        except BadFrame:
            return 1
        if question is None:
            return 0
        with limited_time(float(question.header["cpu_seconds"])):
            answer, go_on = worker.answer(question)
            go_on = go_on and _resident_kib() < _MOST_RESIDENT_KIB
            answers.write(pack(Frame({**answer.header, "ends": not go_on}, answer.parts)))
            answers.flush()
        if not go_on:
            return 0


class Worker:
    """Answers questions, and keeps compiled templates and parsed tokenizers between them."""

    def __init__(self) -> None:
        self._tokenizers: OrderedDict[str, Tokenizer] = OrderedDict()
        self._kinds: dict[str, Callable[[Frame], Frame]] = {
            "render": self._render,
            "keep": self._keep,
            "encode": self._encode,
            "read": self._read,
        }

    def answer(self, question: Frame) -> tuple[Frame, bool]:
        """The answer, and whether this process may go on: not after a panic or exhausted memory."""
        try:
            return self._kinds[question.header["kind"]](question), True
        except MemoryError:
            return Frame({"failed": "memory"}), False
        except BaseException as error:
            if not is_panic(error):
                raise
            return Frame({"failed": "panic", "problem": printable(str(error))}), False

    def _render(self, question: Frame) -> Frame:
        asked = question.header
        try:
            text = template.render(
                asked["source"], asked["messages"], asked["variables"], asked["most_characters"]
            )
        except template.Refusal as error:
            return Frame({"failed": "refusal", "problem": printable(str(error))})
        except template.TemplateFault as error:
            failed = "broken" if error.broken else "fault"
            return Frame({"failed": failed, "problem": error.problem, "line": error.line})
        except template.TooLong:
            return Frame({"failed": "long"})
        return Frame({}, {"text": text.encode()})

    def _keep(self, question: Frame) -> Frame:
        self._tokenizers[question.header["key"]] = Tokenizer.from_str(question.parts["core"].decode())
        if len(self._tokenizers) > _KEPT_TOKENIZERS:
            self._tokenizers.popitem(last=False)
        return Frame({})

    def _encode(self, question: Frame) -> Frame:
        key = question.header["key"]
        if key not in self._tokenizers:
            return Frame({"failed": "unknown"})
        self._tokenizers.move_to_end(key)
        try:
            [found] = self._tokenizers[key].encode_batch_fast(
                [question.parts["text"].decode()], add_special_tokens=question.header["special"]
            )
        except Exception as error:  # noqa: BLE001 - tokenizers raises bare Exception
            return Frame({"failed": "fault", "problem": printable(str(error))})
        return Frame({}, {"ids": array("I", found.ids).tobytes()})

    def _read(self, question: Frame) -> Frame:
        # This imports transformers, which takes most of a second: only workers that read tokenizers need it.
        # Some versions (5.17) would import torch, which tokenizers don't need: its CUDA libraries alone take
        # more addresses than a worker may have.
        sys.modules.setdefault("torch", None)  # type: ignore[arg-type]  # None forbids an import
        from polygraft.engine.sandbox.trial import read_and_try

        return read_and_try(question.parts, question.header["base"])


def _resident_kib() -> float:
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**10
    except (OSError, ValueError, IndexError):
        return 0.0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
