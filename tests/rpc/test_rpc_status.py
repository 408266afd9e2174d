from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from polygraft import errors
from polygraft.rpc.status import CODES, code_of, to_status


def subclasses(kind: type) -> Iterator[type]:
    yield kind
    for child in kind.__subclasses__():
        yield from subclasses(child)


OURS = sorted(
    {kind for kind in subclasses(errors.PolygraftError) if kind.__module__ == "polygraft.errors"},
    key=lambda kind: kind.__name__,
)

EXAMPLES = {
    errors.ConfigError: errors.ConfigError("--x", "secret"),
    errors.InvalidRequest: errors.InvalidRequest("a.b", "bad"),
    errors.ContextLengthExceeded: errors.ContextLengthExceeded("prompt", "3 + 4 > 5"),
    errors.NotSupported: errors.NotSupported("a.b", "no"),
    errors.AdapterInvalid: errors.AdapterInvalid("json", ["one", "two"]),
    errors.ResourceExhausted: errors.ResourceExhausted("full", retry_after=2.5),
    errors.ChatTemplateFailed: errors.ChatTemplateFailed("adapter 'json'", "division by zero", 3),
    errors.TokenizerFailed: errors.TokenizerFailed("no unknown token"),
    **{
        kind: kind("json", "because")
        for kind in (
            errors.AdapterError,
            errors.AdapterNotFound,
            errors.AdapterExists,
            errors.AdapterUnavailable,
        )
    },
}


def example(kind: type[errors.PolygraftError]) -> errors.PolygraftError:
    return EXAMPLES.get(kind) or kind("secret")


def unpack(status: status_pb2.Status, message: type) -> list:
    found = []
    for packed in status.details:
        detail = message()
        if packed.Unpack(detail):
            found.append(detail)
    return found


@pytest.mark.parametrize("kind", OURS, ids=lambda kind: kind.__name__)
def test_every_error_has_a_row_and_an_error_info(kind: type[errors.PolygraftError]) -> None:
    assert kind in CODES
    error = example(kind)
    status = to_status(error, "id-1")
    assert status.code == code_of(error).value[0]
    (info,) = unpack(status, error_details_pb2.ErrorInfo)
    assert (info.domain, info.reason) == ("polygraft", kind.reason)
    if code_of(error) is grpc.StatusCode.INTERNAL:
        assert "secret" not in status.message
        assert "id-1" in status.message
        assert info.metadata["request_id"] == "id-1"
    else:
        assert status.message == str(error)


def test_the_table_has_nothing_else() -> None:
    assert set(CODES) == set(OURS)


def test_a_subclass_without_a_row_takes_its_parents() -> None:
    class Odd(errors.AdapterNotFound):
        pass

    assert code_of(Odd("a", "b")) is grpc.StatusCode.NOT_FOUND
    assert code_of(ValueError("x")) is grpc.StatusCode.INTERNAL


def test_a_wrong_field_is_a_violation() -> None:
    status = to_status(errors.InvalidRequest("sampling.top_p", "must be in (0, 1]"), "id")
    (bad,) = unpack(status, error_details_pb2.BadRequest)
    assert [(v.field, v.description) for v in bad.field_violations] == [
        ("sampling.top_p", "must be in (0, 1]")
    ]


def test_every_problem_of_a_folder_is_a_violation() -> None:
    status = to_status(errors.AdapterInvalid("json", ["one", "two"]), "id")
    (bad,) = unpack(status, error_details_pb2.BadRequest)
    assert [(v.field, v.description) for v in bad.field_violations] == [("source", "one"), ("source", "two")]
    (info,) = unpack(status, error_details_pb2.ErrorInfo)
    assert info.metadata["adapter"] == "json"


def test_a_later_try_is_suggested_when_full() -> None:
    (retry,) = unpack(to_status(errors.ResourceExhausted("full", 2.5), "id"), error_details_pb2.RetryInfo)
    assert retry.retry_delay.ToMilliseconds() == 2500


@pytest.mark.parametrize("problem", ["short", "p" * 5000, "ü" * 3000, "\udcff" * 300])
def test_details_fit_into_trailers(problem: str) -> None:
    status = to_status(errors.AdapterInvalid("json", [problem] * 500), "id")
    assert status.ByteSize() * 4 / 3 + 3 * len(status.message.encode()) < 8000
    (bad,) = unpack(status, error_details_pb2.BadRequest)
    shown = len(bad.field_violations) - 1
    assert 5 <= shown <= 20
    assert bad.field_violations[-1].description == f"and {500 - shown} more problems"


def test_a_huge_field_is_cut() -> None:
    status = to_status(errors.InvalidRequest("f" * 10**5, "p" * 10**5), "id")
    assert status.ByteSize() < 2000
