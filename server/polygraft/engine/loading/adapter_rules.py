"""What must be true of an adapter's folder for it to be served.

A server's loads and `polygraft adapters check` both ask `AdapterRules.examine`, and no rule is anywhere else:
what one accepts the other does. Beyond it is only what a running server alone can know, which `unchecked`
lists.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass

from polygraft.adapters.compile import compile_adapter
from polygraft.adapters.files.folder import AdapterFolder
from polygraft.adapters.limits import AdapterLimits
from polygraft.core.adapter_weights import AdapterWeights
from polygraft.core.spec import BaseSpec
from polygraft.engine.prompts.prompts import Prompts
from polygraft.errors import AdapterInvalid

SMOKE_TEST_TOKENS = 8
"""Tokens that are run with every adapter when it is loaded."""

ReadPrompts = Callable[[AdapterFolder, int | None], Generator[None, None, Prompts | None]]
"""What a folder brings along to be talked to in its own way, with as many tokens; raises AdapterInvalid."""


@dataclass(frozen=True, slots=True)
class Room:
    """Where an adapter must fit in.

    Args:
        context_length: tokens of one request, virtual ones included.
        block_size: tokens in a block of the KV cache.
        blocks: of the KV cache; None where there is none yet.
        merged_bytes: what merged copies may take; None where nobody knows.
    """

    context_length: int
    block_size: int
    blocks: int | None = None
    merged_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Examined:
    """What a folder that may be served comes to.

    Args:
        prompts: what it brings along; None if its requests are read as the base's.
    """

    compiled: AdapterWeights
    prompts: Prompts | None
    modules: int
    warnings: tuple[str, ...]


class AdapterRules:
    """The rules of one server, or of one that there could be.

    Args:
        base: what adapters are compiled for.
        read_prompts: None where the base's tokenizer isn't at hand.
    """

    def __init__(
        self, base: BaseSpec, limits: AdapterLimits, room: Room, read_prompts: ReadPrompts | None
    ) -> None:
        self._base = base
        self._limits = limits
        self._room = room
        self._read_prompts = read_prompts

    def examine(self, folder: AdapterFolder) -> Generator[None, None, Examined]:
        """Compile a folder and hold it against every rule, in slices: it yields where it may be interrupted.

        Raises:
            AdapterInvalid: with everything that is wrong.
        """
        compiled = yield from compile_adapter(folder, self._base, self._limits)
        yield
        prompts = None
        if self._read_prompts is not None:
            prompts = yield from self._read_prompts(folder, compiled.vocabulary)
            yield
        self._check_room(folder.name, compiled)
        return Examined(
            compiled,
            prompts,
            modules=compiled.num_modules or (len(self._base.attention) if compiled.prefix else 0),
            warnings=(*compiled.warnings, *(() if prompts is None else prompts.warnings)),
        )

    def _check_room(self, name: str, compiled: AdapterWeights) -> None:
        room = self._room
        tokens = SMOKE_TEST_TOKENS + len(compiled.invocation)
        if tokens > room.context_length:
            raise AdapterInvalid(
                name, [f"{len(compiled.invocation)} invocation tokens don't fit the context"]
            )
        if compiled.virtual_tokens >= room.context_length - tokens:
            raise AdapterInvalid(
                name,
                [
                    f"{compiled.virtual_tokens} virtual tokens leave no room in the context of "
                    f"{room.context_length}"
                ],
            )
        if room.blocks is None:
            return
        needed = -(-compiled.virtual_tokens // room.block_size) - (-tokens // room.block_size)
        if needed > room.blocks:
            raise AdapterInvalid(
                name,
                [f"{compiled.virtual_tokens} virtual tokens don't fit the KV cache of "
                 f"{room.blocks * room.block_size} tokens (--kv-cache-bytes)"],
            )  # fmt: skip

    def check_copy(self, name: str, compiled: AdapterWeights, copy_bytes: int) -> None:
        """Refuse one that is served merged only and of which there can't be a copy.

        Args:
            copy_bytes: what a merged copy takes.

        Raises:
            AdapterInvalid.
        """
        allowed = self._room.merged_bytes
        if compiled.merged_only and allowed is not None and copy_bytes > allowed:
            raise AdapterInvalid(
                name,
                [
                    f"{compiled.kind} is served merged only, and a merged copy takes {copy_bytes} bytes, "
                    f"--merged-bytes allows {allowed}"
                ],
            )

    def unchecked(self, folder: AdapterFolder, compiled: AdapterWeights) -> tuple[str, ...]:
        """What only a server can tell of a folder that has passed: conditions that loading holds it to."""
        of_base = any(change.makes_weights for change in compiled.modules.values())
        no_cache = self._room.blocks is None
        notes = {
            "its tokenizer and chat template can be used beside the base's, which aren't here": bool(
                folder.texts and self._read_prompts is None
            ),
            "its rows of tokens go with the base's weights": bool(compiled.token_rows),
            "what it computes from the base's weights is finite": of_base,
            "its virtual tokens fit the KV cache": no_cache and compiled.virtual_tokens > 0,
            "a merged copy of it fits --merged-bytes": compiled.merged_only,
            "its logits are finite": True,
        }
        return tuple(note for note, applies in notes.items() if applies)
