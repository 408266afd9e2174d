"""Rust panics: errors that libraries raise as something other than an `Exception`."""

from __future__ import annotations


def is_panic(error: BaseException) -> bool:
    """Whether a library written in Rust has panicked.

    pyo3's PanicException derives from BaseException, so `except Exception` doesn't catch it, and it can't be
    imported from any module.
    """
    return type(error).__name__ == "PanicException" and not isinstance(error, Exception)
