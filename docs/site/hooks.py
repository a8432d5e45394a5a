"""What mkdocs.yml adds to the pages of docs/: README.md as the first one, and links that lead out of docs/ as words."""

import re
from pathlib import Path

from mkdocs.structure.files import File

REPOSITORY = Path(__file__).parents[2]
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files, config):
    """The README as index.md, its links seen from docs/."""
    text = (REPOSITORY / "README.md").read_text()
    text = LINK.sub(lambda link: link[0] if _is_elsewhere(link[3]) else _seen_from_docs(*link.groups()), text)
    files.append(File.generated(config, "index.md", content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    """The README's own links are the first page's; others out of docs/ lead to files that a site does not have."""
    text = LINK.sub(lambda link: f"[{link[2]}](index.md{link[3][12:]})" if _is_readme(link[3]) else link[0], markdown)
    return LINK.sub(lambda link: link[2] if link[3].startswith("../") else link[0], text)


def _is_elsewhere(target: str) -> bool:
    return "://" in target or target.startswith("#")


def _is_readme(target: str) -> bool:
    return target.split("#")[0] == "../README.md"


def _seen_from_docs(picture: str, words: str, target: str) -> str:
    inside = target.startswith("docs/")
    return f"{picture}[{words}]({target[5:] if inside else '../' + target})"
