r"""Markdown extension for equations: `$x_k$` in a line and fenced blocks of the language `math`, as on GitHub.

They become MathML, which browsers draw without scripts or fonts from elsewhere.
"""

import re
from typing import Any

from latex2mathml.converter import convert
from markdown import Markdown
from markdown.extensions import Extension
from markdown.inlinepatterns import InlineProcessor


class _Inline(InlineProcessor):
    def handleMatch(self, m: re.Match[str], data: str) -> tuple[str, int, int]:  # type: ignore[override]  # noqa: N802
        return self.md.htmlStash.store(convert(m[1])), m.start(0), m.end(0)


class MathML(Extension):
    """Converts equations between single dollar signs."""

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802
        # Below the priority of code spans, above that of escapes and emphasis.
        md.inlinePatterns.register(_Inline(r"\$(?! )([^$\n]+?)(?<! )\$", md), "mathml", 185)


def makeExtension(**options: Any) -> MathML:  # noqa: N802
    """Return the extension, as Python-Markdown requires."""
    return MathML(**options)


def fence(source: str, language: str, css_class: str, options: Any, md: Markdown, **arguments: Any) -> str:
    """Format a fenced block of the language `math`, for `pymdownx.superfences`."""
    return f'<div class="math">{convert(source.strip(), display="block")}</div>'
