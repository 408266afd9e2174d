"""The public surface: what `__init__` promises, and what importing it costs."""

import inspect
import subprocess
import sys
import typing
from types import ModuleType
from typing import Any

import pytest

import polygraft_client
from polygraft_client import Adapters, AsyncAdapters, AsyncClient, Client, LoraPath, Score


def test_all_is_exactly_the_public_names() -> None:
    public = {
        name
        for name, value in vars(polygraft_client).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert sorted(public) == sorted(polygraft_client.__all__)


def test_public_names_call_themselves_public() -> None:
    for name in set(polygraft_client.__all__) - {"Chat"}:
        assert getattr(polygraft_client, name).__module__ == "polygraft_client", name


def test_imports_only_its_own_dependencies() -> None:
    heavy = ["torch", "transformers", "numpy", "pydantic", "rich", "typer", "polygraft"]
    code = f"import sys, polygraft_client; print([m for m in {heavy} if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def methods(cls: type) -> dict[str, Any]:
    return {name: value for name, value in vars(cls).items() if not name.startswith("_") and callable(value)}


@pytest.mark.parametrize(("one", "other"), [(Client, AsyncClient), (Adapters, AsyncAdapters)])
def test_both_clients_have_the_same_methods(one: type, other: type) -> None:
    assert methods(one).keys() == methods(other).keys()
    assert {"stream", "list"} & methods(one).keys()
    for name, method in methods(one).items():
        twin = methods(other)[name]
        assert inspect.signature(method).parameters == inspect.signature(twin).parameters
        assert not inspect.iscoroutinefunction(method)
        if name not in ("stream", "list"):
            assert method.__doc__ == twin.__doc__
            assert inspect.iscoroutinefunction(twin)


def test_methods_are_documented_like_written_ones() -> None:
    for cls in (Client, AsyncClient):
        assert cls.score.__name__ == "score"
        signature = inspect.signature(cls.score)
        assert list(signature.parameters)[:3] == ["self", "prompt", "continuations"]
        assert signature.return_annotation is Score
        assert typing.get_type_hints(cls.score)["lora_path"].__args__[0] is LoraPath
        assert (cls.score.__doc__ or "").startswith("Log-likelihoods of continuations")
