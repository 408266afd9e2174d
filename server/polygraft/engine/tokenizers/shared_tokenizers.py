"""One tokenizer for all adapters that ship the same, and the base's own for those that ship that.

A vocabulary takes megabytes and most of a second to parse, and trainers save one beside every adapter.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from weakref import WeakValueDictionary

from polygraft.base.tokenizer import TOKENIZER, VOCABULARIES, TextTokenizer
from polygraft.engine.tokenizers.adapter_tokenizer import read_tokenizer, slow_class
from polygraft.engine.tokenizers.base_vocabulary import BaseVocabulary
from polygraft.engine.tokenizers.prompt_files import listed_tokens, tokenizer_files
from polygraft.errors import AdapterInvalid

_KEPT = 64
"""How many tokenizers with the base's backend are kept even if no adapter uses them."""
_NAMED = 5
"""How many tokens an error names."""


Read = Callable[[str, Mapping[str, bytes]], TextTokenizer]
"""Makes a tokenizer from an adapter's name and files; raises AdapterInvalid."""


class SharedTokenizers:
    """The tokenizers in use, by the content of their files.

    Args:
        read: used instead of `read_tokenizer`, to try the files in a worker first.
    """

    def __init__(self, base: TextTokenizer, read: Read | None = None) -> None:
        self._base = base
        self._tried = read
        self._vocabulary = BaseVocabulary(base)
        self._read: WeakValueDictionary[str, TextTokenizer] = WeakValueDictionary()
        self._like_base: dict[str, TextTokenizer] = {}

    def of(self, name: str, files: Mapping[str, bytes]) -> TextTokenizer:
        """The tokenizer of an adapter's files; what they leave unset is the base's. If they change nothing
        about encoding and decoding, it shares the base's backend.

        Args:
            name: the adapter's, for errors.
            files: content by file name.

        Raises:
            AdapterInvalid: a file is broken or contradicts another, or the vocabulary has a form that isn't
                supported.
        """
        own = tokenizer_files(name, files)
        if not own:
            return self._base
        digest = hashlib.sha256()
        for file, content in sorted(own.items()):
            digest.update(b"%s\0%d\0" % (file.encode(), len(content)))
            digest.update(content)
        key = digest.hexdigest()
        found = self._read.get(key)
        if found is None:
            found = self._read[key] = self._of_new(name, own)
            if found.backend is self._base.backend:
                # Kept even if unused, since the next adapter from the same trainer will ask for it.
                self._like_base[key] = found
                if len(self._like_base) > _KEPT:
                    del self._like_base[next(iter(self._like_base))]
        return found

    def _of_new(self, name: str, files: Mapping[str, bytes]) -> TextTokenizer:
        read = self._tried or read_tokenizer
        listed = listed_tokens(name, files)
        if self._is_base(name, files):
            beside = {
                file: content for file, content in files.items() if file not in (TOKENIZER, *VOCABULARIES)
            }
            # A skeleton shows within a millisecond what the other files add, which is usually nothing.
            tokenizer = read(name, {**beside, TOKENIZER: self._vocabulary.skeleton})
            if self._vocabulary.adds_nothing(tokenizer):
                tokenizer = replace(tokenizer, backend=self._base.backend)
            else:
                tokenizer = read(name, {**beside, TOKENIZER: self._vocabulary.whole})
        else:
            tokenizer = read(name, files)
        if tokenizer.backend is not self._base.backend and self._vocabulary.equals(tokenizer):
            tokenizer = replace(tokenizer, backend=self._base.backend)
        self._check_listed(name, files, listed, tokenizer)
        if tokenizer.backend is self._base.backend:
            return replace(self._base, special_tokens=tokenizer.special_tokens or self._base.special_tokens)
        return replace(tokenizer, special_tokens=tokenizer.special_tokens or self._base.special_tokens)

    def _is_base(self, name: str, files: Mapping[str, bytes]) -> bool:
        """Whether the vocabulary is the base's own, in whatever file. Raises AdapterInvalid if it can neither
        be compared nor read."""
        if TOKENIZER in files:
            return self._vocabulary.is_file(TOKENIZER, files[TOKENIZER])
        vocabulary = [file for file in VOCABULARIES if file in files]
        if all(self._vocabulary.is_file(file, files[file]) for file in vocabulary):
            return True
        if slow_class(name, files) is not None:
            return False
        if all(self._vocabulary.says_the_same(name, file, files[file]) for file in vocabulary):
            return True
        raise AdapterInvalid(
            name,
            [f"its vocabulary is in {' and '.join(vocabulary)} alone, isn't the base's and can't be read "
             "from there: save the tokenizer again, so that there is a tokenizer.json"],
        )  # fmt: skip

    def _check_listed(
        self, name: str, files: Mapping[str, bytes], listed: Mapping[str, int], tokenizer: TextTokenizer
    ) -> None:
        """Raise AdapterInvalid if a listed token gets another id than its listed one, with which the adapter
        was trained. For a token of the vocabulary itself, its id there counts, as in transformers."""
        wrong = {
            token: (id, got)
            for token, id in listed.items()
            if (got := tokenizer.backend.token_to_id(token)) != id
        }
        if wrong:
            known = self._known(files)
            wrong = {token: ids for token, ids in wrong.items() if token not in known}
        if wrong:
            shown = ", ".join(
                f"{token[:50]!r} is listed as {id} and would be {got}"
                for token, (id, got) in list(wrong.items())[:_NAMED]
            )
            more = f", and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else ""
            raise AdapterInvalid(
                name,
                [f"its added tokens don't follow its vocabulary: {shown}{more}; save the tokenizer again, so "
                 "that there is a tokenizer.json with them"],
            )  # fmt: skip

    def _known(self, files: Mapping[str, bytes]) -> set[str]:
        """The vocabulary's tokens, without those that other files add."""
        if TOKENIZER in files:
            content = json.loads(files[TOKENIZER])
            vocabulary = content["model"].get("vocab", ())
            known = {piece if isinstance(piece, str) else piece[0] for piece in vocabulary}
            return known | {token["content"] for token in content.get("added_tokens", ())}
        if any(file in files for file in VOCABULARIES):
            return set()
        return set(self._base.backend.get_vocab(with_added_tokens=True))
