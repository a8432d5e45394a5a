"""Docstrings as Markdown: a line `name: what it is` becomes an item of a list, with the lines that go on from it."""

import re
import textwrap

import griffe

ITEM = re.compile(r"^([A-Za-z_]\w*(?:, [A-Za-z_]\w*)*)( \([^)]*\))?: ")
NO_ITEM = ("Raises", "Returns")


class Lists(griffe.Extension):
    def on_object(self, *, obj, loader, **kwargs):
        if obj.docstring is not None:
            obj.docstring.value = with_lists(obj.docstring.value)


def with_lists(text: str) -> str:
    lines, in_list = [], False
    for line in textwrap.dedent(text).splitlines():
        begins = ITEM.match(line) and not line.startswith(NO_ITEM)
        goes_on = in_list and line.startswith(" ")
        if bool(begins) != in_list and not goes_on:
            lines.append("")  # before a list, and after it
        if not goes_on:
            in_list = bool(begins)
        lines.append(ITEM.sub(r"- **\1**\2: ", line) if begins else line)
    return "\n".join(lines)
