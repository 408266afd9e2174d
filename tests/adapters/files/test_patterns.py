"""Patterns of a configuration mean what they mean in PEFT, and cost little whatever they are."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polygraft.adapters.files.patterns import (
    MAX_PATTERN,
    MAX_PATTERNS,
    BadPattern,
    Form,
    KeyPatterns,
    Matching,
    OptionByModule,
)

NAMES = [
    f"model.layers.{n}.{m}" for n in range(3) for m in ("self_attn.q_proj", "mlp.up_proj", "q_projector")
]
NAMES += ["lm_head", "model.embed_tokens", "h.1.c_attn"]
PARTS = [
    "model",
    "layers",
    "0",
    "1",
    "2",
    "self_attn",
    "q_proj",
    "mlp",
    "up_proj",
    "q_projector",
    "lm_head",
    "h",
]
SEPARATORS = [".", r"\.", "_", "|", ".*", ""]
# What each form is in PEFT's own words.
PEFT: dict[Form, Callable[[str, str], object]] = {
    Form.KEY: lambda pattern, name: re.match(rf"(.*\.)?({pattern})$", name),
    Form.ENDING: lambda pattern, name: re.match(rf".*\.{pattern}$", name),
    Form.WITHIN: lambda pattern, name: re.match(rf"(^|.*\.){pattern}($|\..*)", name),
    Form.ANYWHERE: lambda pattern, name: re.search(pattern, name),
}


@st.composite
def patterns(draw: st.DrawFn) -> str:
    parts = draw(st.lists(st.sampled_from(PARTS), min_size=1, max_size=4))
    separators = draw(st.lists(st.sampled_from(SEPARATORS), min_size=3, max_size=3))
    text = "".join(part + separator for part, separator in zip(parts, [*separators, ""], strict=False))
    text = text.removesuffix(separators[len(parts) - 1]) if len(parts) < 4 else text
    # A dot that stands for another character.
    return draw(st.sampled_from([text, text.replace("_", "."), f"^{text}", f"{text}$"]))


@given(st.lists(patterns(), max_size=8), st.sampled_from(list(PEFT)))
@settings(max_examples=300, deadline=None)
def test_the_first_pattern_is_peft_s(several: list[str], form: Form) -> None:
    found = KeyPatterns(several, form, Matching())
    for name in NAMES:
        expected = next((pattern for pattern in several if PEFT[form](pattern, name)), None)
        assert found.first(name) == expected


def test_an_option_by_module_of_the_kinds_that_look_for_ends() -> None:
    option = OptionByModule({"q_proj": 1, "lm_head": 2}, Form.ENDING, Matching())
    assert option.of("a.q_proj", 0) == 1
    assert option.of("lm_head", 0) == 2  # the whole name as it is
    assert option.of("a.k_proj", 0) == 0


BAD = [
    "[", "(", "(?P<n>x", "x{2,1}", "(" * 2000 + ")" * 2000, "x" * (MAX_PATTERN + 1),
    ".{1000000000}", "x{1000000}", "(x{1000}){1000}", r"\\{1000000000}", "[{}]{999999999}",
    # Only the library that matches knows these, and PEFT reads them otherwise or not at all.
    "(?:foo){e<=1}", r"\p{L}", "(?R)", r"\L<names>", "(?i)x|(?V1)y",
]  # fmt: skip


@pytest.mark.parametrize("pattern", BAD, ids=lambda pattern: pattern[:20])
@pytest.mark.parametrize("form", Form)
def test_what_is_no_pattern_or_takes_memory(form: Form, pattern: str) -> None:
    with pytest.raises(BadPattern):
        Matching().match(form, pattern, NAMES[0])


@pytest.mark.parametrize(
    "pattern", [r"(?:[a-z_.0-9]|\w\w|.)+[!?]", r"(.*)*x!", r"(\w+\.?)+!", r"(?=(.+)+!)"], ids=range(4)
)
def test_backtracking_ends(pattern: str) -> None:
    matching = Matching()
    began = time.thread_time()
    for _ in range(100):
        # Not found, be it at once or because it would take too long.
        with contextlib.suppress(BadPattern):
            assert matching.match(Form.KEY, pattern, "a" * 200) is None
    assert time.thread_time() - began < 20


def test_patterns_that_take_long_each_end_together() -> None:
    several = [rf"(?:\w|\w\w|\w\w\w|{n})+[!?]" for n in range(MAX_PATTERNS)]
    found = KeyPatterns(several, Form.KEY, Matching())
    began = time.thread_time()
    with pytest.raises(BadPattern, match="too long"):
        for n in range(1000):
            found.first("a" * 17 + f"{n}")
    assert time.thread_time() - began < 20


def test_too_many_that_are_no_names() -> None:
    KeyPatterns([f"a{n}|b" for n in range(MAX_PATTERNS)], Form.KEY, Matching())
    with pytest.raises(BadPattern, match="the limit is 512"):
        KeyPatterns([f"a{n}|b" for n in range(MAX_PATTERNS + 1)], Form.KEY, Matching())


def test_thousands_of_names_on_a_thousand_modules_are_looked_up() -> None:
    modules = [f"model.layers.{n}.self_attn.q_proj" for n in range(1000)]
    began = time.thread_time()
    for form in (Form.KEY, Form.ENDING, Form.WITHIN):
        found = KeyPatterns([f"x{n}.y.{n}" for n in range(30_000)] + modules, form, Matching())
        assert [found.first(name) for name in modules] == ([None] * 1000 if form is Form.ENDING else modules)
    assert time.thread_time() - began < 5
