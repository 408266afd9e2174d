"""What lies unread: joined without a loss, weighed, and read in pieces."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from polygraft.core.output import RequestOutput
from polygraft.engine.unread import PIECE, Unread, weight
from polygraft.errors import EngineDead
from polygraft_types.answers import TokenLogprob, TopLogprob

LOGPROB = TokenLogprob(1, "a", -0.5, (TopLogprob(1, "a", -0.5), TopLogprob(2, "b", -1.5)))
outputs = st.builds(
    lambda text, ids, entries: RequestOutput("r", text, tuple(ids), logprobs=(LOGPROB,) * entries),
    st.text(max_size=8),
    st.lists(st.integers(0, 9), max_size=3),
    st.integers(0, 2),
)


@given(st.lists(outputs, max_size=300), st.lists(st.integers(0, 300), max_size=5), st.booleans())
def test_what_goes_in_comes_out(given: list[RequestOutput], reads: list[int], fails: bool) -> None:
    unread, taken = Unread(), []
    for at, output in enumerate(given):
        unread.add(output)
        while at in reads and unread:
            taken.append(unread.take())
    error = EngineDead("no")
    if fails:
        unread.add(RequestOutput("r", error=error))
    while unread:
        taken.append(unread.take())
    assert unread.bytes == 0
    if fails:
        assert taken.pop() == RequestOutput("r", error=error)
    assert "".join(output.text for output in taken) == "".join(output.text for output in given)
    for of in (lambda output: output.token_ids, lambda output: output.logprobs):
        assert [one for output in taken for one in of(output)] == [one for o in given for one in of(o)]


def test_the_first_outputs_prompt_stays_in_front() -> None:
    unread = Unread()
    unread.add(RequestOutput("r", "ab", (1,), prompt_ids=(7, 8)))
    unread.add(RequestOutput("r", "c", (2,)))
    assert unread.take() == RequestOutput("r", "abc", (1, 2), prompt_ids=(7, 8))


def test_much_is_read_in_pieces() -> None:
    unread = Unread()
    for _ in range(60):
        unread.add(RequestOutput("r", "x" * 1000))
    sizes = []
    while unread:
        sizes.append(weight(unread.take()))
    assert max(sizes) <= PIECE
    assert len(sizes) == 5


def test_outputs_that_lie_are_joined() -> None:
    unread = Unread()
    for _ in range(1000):
        unread.add(RequestOutput("r", "x", (1,)))
    assert unread.bytes < 1000 * weight(RequestOutput("r", "x", (1,))) / 3
