"""Panics of Rust: what a library raises that isn't an `Exception`, though it is an error like any other."""

from __future__ import annotations


def is_panic(error: BaseException) -> bool:
    """Whether a library written in Rust has panicked.

    pyo3 derives its PanicException from BaseException, so that `except Exception` lets it through, and has no
    module from which it could be imported.
    """
    return type(error).__name__ == "PanicException" and not isinstance(error, Exception)
