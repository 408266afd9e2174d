"""Configuration values as errors show them."""

from __future__ import annotations

import reprlib

from polygraft.printable import printable

_SHORT = reprlib.Repr()
_SHORT.maxlevel = 4
_SHORT.maxdict = _SHORT.maxlist = 20
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 200
"""Reads no more of a value than it shows, since one may be a megabyte long or nested a thousand deep."""


def shown(value: object) -> str:
    """Return a configuration value for an error's text."""
    return printable(_SHORT.repr(value), 203)
