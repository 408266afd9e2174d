"""The public surface: what `__init__` promises, and what importing it costs."""

import subprocess
import sys
from types import ModuleType

import polygraft_client


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
