"""What is left of loading: objects that Python's collector would look at, memory that the C library keeps."""

from __future__ import annotations

import gc

from polygraft.layers.linear.memory import give_back


def keep_for_good() -> None:
    """Take all objects that there are now out of the garbage collector's sight.

    A base with transformers and torch is some hundred thousand objects that stay until the process ends, and
    every full collection would look at each of them, in the middle of a step (0.35 s for the default model).
    What is no longer referenced goes as ever; only a cycle of objects that is let go of later stays until
    this is called again.

    What loading has freed goes back to the system.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    give_back()
