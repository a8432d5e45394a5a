"""What reaches into private parts of other libraries: one file a library, and nothing of it anywhere else.

Each file ends in PARTS, a list of what it reaches into. tests/training/test_internals.py looks every one of them up, so
that an upgrade that takes one away fails there with its name. modeling/ is published file by file and keeps its own
uses; the same test lists them.
"""

from typing import NamedTuple


class Part(NamedTuple):
    """A private part of a library: its dotted name, what stands in its place or is done with it, why, and until when.

    The last component of `name` may be an attribute that the class or the module sets on its objects.
    """

    name: str
    use: str
    why: str
    until: str
