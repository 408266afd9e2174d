"""Turns a call into a method of `Client` or `AsyncClient`.

`_calls` describes each call once, as a function that takes the method's arguments and returns a `Call`.
`blocking` makes a method of it that returns the result, `awaitable` one that must be awaited. Both keep the
parameters' types and the docstring.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from polygraft_client._calls import Call
from polygraft_client._transport import AsyncTransport, Transport

_P = ParamSpec("_P")
_R = TypeVar("_R")


class _Blocking(Protocol):
    _transport: Transport


class _Async(Protocol):
    _transport: AsyncTransport


def blocking(describe: Callable[_P, Call[_R]]) -> Callable[Concatenate[_Blocking, _P], _R]:
    """A method that makes the call and returns its result."""

    def method(self: _Blocking, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        return self._transport.run(describe(*args, **kwargs))

    _document(method, describe)
    return method


def awaitable(
    describe: Callable[_P, Call[_R]],
) -> Callable[Concatenate[_Async, _P], Coroutine[Any, Any, _R]]:
    """A coroutine method that makes the call and returns its result."""

    async def method(self: _Async, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        return await self._transport.run(describe(*args, **kwargs))

    _document(method, describe)
    return method


def _document(method: Any, describe: Callable[..., Call[Any]]) -> None:
    """Give `method` the name, the docstring and the parameters of `describe`, and its result's type."""
    hints = typing.get_type_hints(describe)
    (hints["return"],) = typing.get_args(hints["return"])  # R of Call[R]
    signature = inspect.signature(describe)
    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = [itself, *signature.parameters.values()]
    method.__signature__ = signature.replace(parameters=parameters, return_annotation=hints["return"])
    method.__annotations__ = hints
    method.__doc__ = describe.__doc__
    method.__name__ = method.__qualname__ = describe.__name__
    method.__module__ = describe.__module__
