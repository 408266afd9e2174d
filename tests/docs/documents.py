"""The documents, and what in them can be checked: fenced blocks, code spans, links and headings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.md", "docs/**/*.md", "deploy/*.md", "adapters/*.md", "adapters/*/README.md")
    for path in ROOT.glob(pattern)
)
_MARKDOWN = MarkdownIt("commonmark").enable("table")


@dataclass(frozen=True)
class Snippet:
    """A fenced block. `output` is that of the `text` block which follows it directly, if one does."""

    document: str
    language: str
    text: str
    output: str | None

    @property
    def key(self) -> tuple[str, str]:
        """The document and the first line, by which a table can name the snippet."""
        return self.document, self.text.strip().splitlines()[0].strip()


def snippets() -> Iterator[Snippet]:
    """All fenced blocks of all documents, except those that are another one's output."""
    for document in DOCUMENTS:
        tokens = _MARKDOWN.parse((ROOT / document).read_text(encoding="utf-8"))
        for index, token in enumerate(tokens):
            before = tokens[index - 1] if index else None
            if token.type != "fence" or (before and _is_output(before, token)):
                continue
            after = tokens[index + 1] if index + 1 < len(tokens) else None
            output = after.content if after and _is_output(token, after) else None
            yield Snippet(document, token.info.strip(), token.content, output)


def _is_output(first: Token, second: Token) -> bool:
    if (first.type, second.type) != ("fence", "fence"):
        return False
    return first.info.strip() in {"python", "sh"} and second.info.strip() == "text"


def code_spans(document: str) -> list[str]:
    """The inline code of a document."""
    return [token.content for token in _inline(document) if token.type == "code_inline"]


def links(document: str) -> list[str]:
    """The targets of a document's links."""
    return [str(token.attrs["href"]) for token in _inline(document) if token.type == "link_open"]


def anchors(document: str) -> set[str]:
    """The anchors that GitHub makes of a document's headings."""
    tokens = _MARKDOWN.parse((ROOT / document).read_text(encoding="utf-8"))
    found: set[str] = set()
    for index, token in enumerate(tokens):
        if token.type != "heading_open":
            continue
        text = "".join(child.content for child in tokens[index + 1].children or ())
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        repeated = sum(1 for known in found if re.fullmatch(rf"{re.escape(slug)}(-\d+)?", known))
        found.add(f"{slug}-{repeated}" if slug in found else slug)
    return found


def _inline(document: str) -> Iterator[Token]:
    for token in _MARKDOWN.parse((ROOT / document).read_text(encoding="utf-8")):
        yield from token.children or ()
