"""Markdown extension: `64.9 ± 0.1` and `12.5 %` stay on one line, as in the cells of a table. Not in blocks of code."""

import re
from typing import Any

from markdown import Markdown
from markdown.extensions import Extension
from markdown.postprocessors import Postprocessor


class _Numbers(Postprocessor):
    def run(self, text: str) -> str:
        return re.sub(r"(?<=\d) ± (?=\d)", "&nbsp;±&nbsp;", re.sub(r"(?<=\d) %", "&nbsp;%", text))


class Spaces(Extension):
    """Makes the spaces within a number and its error or unit non-breaking."""

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802
        # Before `raw_html`, which has the priority 30 and puts blocks of code back into the text.
        md.postprocessors.register(_Numbers(md), "spaces", 40)


def makeExtension(**options: Any) -> Spaces:  # noqa: N802
    """Return the extension, as Python-Markdown requires."""
    return Spaces(**options)
