"""Templates render as in transformers, and what goes wrong has the template's line."""

from __future__ import annotations

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from polygraft.engine.sandbox.template import Refusal, TemplateFault, TooLong, render
from tests.tiny import CHAT_TEMPLATE

MESSAGES = [{"role": "user", "content": " <hi> & 日本 "}, {"role": "assistant", "content": "yes"}]
VARIABLES = {"bos_token": "<s>", "eos_token": "</s>", "extra": ["a", "b"]}


@pytest.mark.parametrize(
    "source",
    [
        CHAT_TEMPLATE,
        "{{ bos_token }}{% for m in messages %}\n  {{ m['role'] }}: {{ m.content | trim }}{{ eos_token }}\n{% endfor %}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
        "{% for m in messages %}{% if loop.index0 %}{% break %}{% endif %}{{ m | tojson }}{% continue %}{% endfor %}",
        "{{ messages | tojson(indent=2, sort_keys=True) }}{{ dict(a=1) }}{{ dict.fromkeys([1]) }}{{ extra }}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        "{{ strftime_now('%Y') }}{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}",
        "{% macro f(x) -%}\n  [{{ x }}]\n{%- endmacro %}{{ f('a') }}  \n",
        "{{ undefined_name }}|{{ missing is defined }}",
    ],
)
def test_as_in_transformers(source: str) -> None:
    [[expected], _] = [
        render_jinja_template([MESSAGES], chat_template=source, add_generation_prompt=True, **VARIABLES)[0],
        None,
    ]
    assert render(source, MESSAGES, VARIABLES, 10_000) == expected


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.append(1) }}",
        "{{ ''.__class__ }}",
        "{{ namespace(_a=1) }}",
        "{{ cycler.__init__.__globals__ }}",
    ],
)
def test_nobody_breaks_out_of_it_where_transformers_lets_nobody(source: str) -> None:
    def outcome(call: object) -> object:
        try:
            return call()  # type: ignore[operator] # a function of the test's own
        except Exception as error:  # noqa: BLE001 - whichever it is
            return type(error.__cause__ or error).__name__

    ours = outcome(lambda: render(source, MESSAGES, {}, 1000))
    theirs = outcome(lambda: render_jinja_template([MESSAGES], chat_template=source)[0][0])
    # transformers 5.17 lets a namespace have private names.
    assert ours == theirs or (ours, theirs) == ("SecurityError", "<Namespace {'_a': 1}>")


@pytest.mark.parametrize(
    ("source", "line", "text"),
    [
        ("a\n{{ 1 / 0 }}", 2, "ZeroDivisionError: division by zero"),
        ("\n\n{{ '%c' | format(2**40) }}", 3, "OverflowError"),
        ("{% macro f() %}\n{{ f() }}{% endmacro %}{{ f() }}", 2, "RecursionError"),
        ("{{ 'x'.encode('nonsense') }}", 1, "LookupError: unknown encoding: nonsense"),
        ("x\n{{ messages[5].content.x }}", 2, "UndefinedError"),
        ("{{ 1 + 'a' }}", 1, "TypeError"),
        ("x\n\n{% for %}", 3, "Expected an expression"),
        ("{{ '\\ud800' }}", None, "UnicodeEncodeError"),
    ],
)
def test_faults_have_the_templates_line(source: str, line: int | None, text: str) -> None:
    with pytest.raises(TemplateFault) as caught:
        render(source, MESSAGES, {}, 1000)
    assert caught.value.line == line
    assert text in caught.value.problem
    assert caught.value.problem.isprintable()


def test_a_refusal_is_the_templates_own_word() -> None:
    with pytest.raises(Refusal, match="no system role"):
        render("{{ raise_exception('no system role') }}", MESSAGES, {}, 1000)


def test_a_text_has_a_limit() -> None:
    assert len(render("{{ 'x' * 1000 }}", MESSAGES, {}, 1000)) == 1000
    with pytest.raises(TooLong):
        render("{% for i in range(501) %}ab{% endfor %}", MESSAGES, {}, 1000)
