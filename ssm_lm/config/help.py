"""`ssm-lm train --help-keys`: every key that a config may have, by subject, with its default and a line about it.

Read from syntax trees, as the names are (keys.py): help that takes ten seconds to come is not asked for twice.
"""

import argparse
import ast
import json
import re
import textwrap
from pathlib import Path
from typing import NamedTuple

from .keys import PACKAGE, class_in, fields_of, transformers_folder

OURS, MODEL = "ssm_lm", "Model: keys of `model`, or --model.KEY on the command line"


class Key(NamedTuple):
    """A key of a config. default: as YAML writes it; meaning: a sentence; subject: what it stands under."""

    name: str
    default: str
    meaning: str
    subject: str


class HelpKeys(argparse.Action):
    """The option --help-keys [WORD]: print the keys, or those with the word in their name or line, and end."""

    def __call__(self, parser, namespace, values, option_string=None):
        print(help_text(values))
        parser.exit()


def help_text(word: str | None = None) -> str:
    """The keys for people; with a word, those that have it in their name or their line."""
    found = [key for key in all_keys() if word is None or word.lower() in f"{key.name} {key.meaning}".lower()]
    if not found:
        return f"no key has {word!r} in its name or its line; `ssm-lm train --help-keys` lists all"
    width = min(32, max(len(key.name) for key in found)) + 2
    lines, subject = [], None
    for key in found:
        if key.subject != subject:
            subject = key.subject
            lines += ["", subject]
        text = f"{key.meaning} [{key.default}]"
        lines += textwrap.wrap(
            text,
            118,
            initial_indent=f"  {key.name:<{width}}",
            subsequent_indent=" " * (width + 2),
            break_long_words=False,
        )
    return "\n".join(lines[1:])


def all_keys() -> list[Key]:
    """Those of this project first, then transformers' by its own subjects, then the model's."""
    ours = declared(PACKAGE / "config" / "arguments.py", "S4TrainingArguments", OURS)
    theirs = declared(transformers_folder() / "training_args.py", "TrainingArguments", "")
    changed = {key.name: key.default for key in ours}
    known = {key.name for key in theirs}
    theirs = [key._replace(default=changed.get(key.name, key.default)) for key in theirs]
    model = declared(PACKAGE / "modeling" / "configuration_s4.py", "S4Config", MODEL)
    return [*(key for key in ours if key.name not in known), *theirs, *model]


def declared(path: Path, class_name: str, subject: str) -> list[Key]:
    """The annotated names of a class, in order, under `subject`, or under the headings of the comments among them.

    A line about each is the `help` of its field, or what the docstring of the class says after its name.
    """
    source = path.read_text(encoding="utf-8")
    found = class_in(source, class_name)
    explained = explanations(ast.get_docstring(found) or "")
    headings = {n: m[1] for n, line in enumerate(source.splitlines(), 1) if (m := re.match(r" *# --- (.+) ---$", line))}
    values = {  # names that a default may be given by
        node.targets[0].id: node.value
        for node in ast.walk(found)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    keys = []
    for node in fields_of(found):
        name, default, meaning = node.target.id, node.value, ""
        if isinstance(default, ast.Call):  # field(...)
            given = {word.arg: word.value for word in default.keywords}
            meaning = text_of(given.get("metadata"))
            default = given.get("default", given.get("default_factory"))
        default = values.get(default.id, default) if isinstance(default, ast.Name) else default
        default = default.body if isinstance(default, ast.Lambda) else default
        above = [heading for line, heading in headings.items() if line < node.lineno]
        meaning = first_sentence(explained.get(name) or meaning)
        keys.append(Key(name, as_yaml(default), meaning, above[-1] if above else subject))
    return keys


def as_yaml(default: ast.expr) -> str:
    """A default as a config would say it."""
    if isinstance(default, ast.Name) and default.id in ("list", "dict"):  # a factory
        return json.dumps({"list": [], "dict": {}}[default.id])
    try:
        value = ast.literal_eval(default)
    except ValueError:  # an expression
        return ast.unparse(default)
    return value if isinstance(value, str) and value else json.dumps(value)


def text_of(metadata) -> str:
    """The `help` in the tree of a field's metadata."""
    if not isinstance(metadata, ast.Dict):
        return ""
    texts = [value for key, value in zip(metadata.keys, metadata.values, strict=True) if key.value == "help"]
    return "".join(node.value for text in texts for node in ast.walk(text) if isinstance(node, ast.Constant))


def explanations(docstring: str) -> dict[str, str]:
    """{name: text} of the lines `name: text`, `name, other: text` of a docstring, with what is indented below each."""
    found, names = {}, []
    for line in docstring.splitlines():
        begins, colon, rest = line.partition(": ")
        words = re.sub(r"\([^)]*\)", "", begins).replace(",", "").split()
        if colon and words and not line.startswith(" ") and all(word.isidentifier() for word in words):
            names = words
            found |= dict.fromkeys(names, rest)
        elif names and line.startswith("    ") and line.strip():
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
        else:
            names = []
    return found


def first_sentence(text: str) -> str:
    """Up to the first full stop that a new sentence follows; at most about two lines."""
    text = " ".join(text.split())
    sentence = re.split(r"(?<=[\w)`\"])\.(?: (?=[A-Z`])|$)", text)[0]
    return sentence if len(sentence) <= 220 else sentence[:215].rsplit(" ", 1)[0] + " ..."
