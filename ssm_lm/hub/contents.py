"""What of an exported folder may leave the machine: a list of names, and a look into every file of it.

A folder is refused as a whole unless `ssm-lm export` wrote it, and when it holds a pickle anywhere or names a place of
this machine; files that do not belong to an export are left behind.
"""

import ast
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.dynamic_module_utils import get_relative_import_files

from ..baselines import BASELINES
from ..errors import UserError, one_line
from ..loading.folder import CONFIG, INDEX, WEIGHTS, check_links
from ..loading.model import check_folder
from .card import CARD

TEXTS = (CARD, "LICENSE", "merges.txt", "vocab.txt", "chat_template.jinja")
OBJECTS = (
    *(CONFIG, "generation_config.json", INDEX),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
)
TENSORS = re.compile(re.escape(WEIGHTS) + r"|model-\d{5}-of-\d{5}\.safetensors")

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".dill", ".npy", ".npz")
# an absolute path of any system, two parts deep at least, as a whole string
PLACE = re.compile(r"(?:file://|~?/|[A-Za-z]:[\\/]|\\\\)[\w.@ +-]+[\\/].*", re.DOTALL)
# whose values are pieces of text that a tokenizer knows, and may look like anything
VOCABULARIES = ("tokenizer.json", "vocab.json", "added_tokens.json")
TOKENS = ("content", "added_tokens_decoder", "added_tokens", "extra_special_tokens", "weight_map")


def publishable(folder: Path) -> tuple[list[Path], list[str]]:
    """(the files to publish, the names of those to leave behind) of an exported folder.

    Raises UserError for a folder without a card, a configuration, weights or the code of the model; with weights that
    do not fit the configuration; with a link that leads out of it; with a pickle, whatever its name, in it or below it;
    with a file that is not what its name says; and with a path of this machine in a file that would be published.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give one that `ssm-lm export` wrote")
    export = "write the folder by `ssm-lm export`"
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder}: holds no {CONFIG}, so it is no exported model; {export} first, and push that")
    if not (folder / CARD).is_file():
        raise UserError(f"{folder}: holds no model card ({CARD}); {export} first, and push that")
    check_links(folder, folder, f"put the file itself there, or {export}")
    for file in sorted(folder.rglob("*")):
        if file.is_file() and _is_pickle(file):
            raise UserError(
                f"{file}: is a pickle, which can run code where it is loaded; remove it from the folder, or {export}"
            )
    check_folder(folder)
    names = {*TEXTS, *OBJECTS, *(file.name for file in _code(folder))}
    files = [file for file in sorted(folder.iterdir()) if file.is_file()]
    chosen = [file for file in files if file.name in names or TENSORS.fullmatch(file.name)]
    for file in chosen:
        _check_content(file)
    left = [entry.name + "/" * entry.is_dir() for entry in sorted(folder.iterdir()) if entry not in chosen]
    return chosen, left


def _code(folder: Path) -> list[Path]:
    """The modules that auto_map names and those that they import; UserError when one is not there."""
    again = "the folder would not load elsewhere; write it by `ssm-lm export`"
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    if config["model_type"] in BASELINES and "auto_map" not in config:
        return []  # transformers has it
    auto_map = config.get("auto_map")
    if not isinstance(auto_map, dict) or not all(isinstance(value, str) for value in auto_map.values()):
        raise UserError(f"{folder / CONFIG}: has no auto_map that names the code of the model: {again}")
    found = {}
    for value in auto_map.values():
        entry = folder / f"{value.rpartition('.')[0]}.py"
        if entry.parent != folder or "--" in value:
            raise UserError(f"{folder / CONFIG}: auto_map names {value!r}, which lies elsewhere: {again}")
        try:
            for file in (entry, *map(Path, get_relative_import_files(entry))):
                found[file] = file.read_bytes()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{folder}: the code of the model is not whole ({one_line(error)}): {again}") from error
    return list(found)


def _is_pickle(file: Path) -> bool:
    """By its suffix; by the first bytes of the protocols 2 to 5; or a zip archive that holds one, as torch.save's."""
    if file.suffix.lower() in PICKLE_SUFFIXES:
        return True
    with open(file, "rb") as stream:
        start = stream.read(4)
    if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return not _is_safetensors(file)  # which begins with the length of its header, any number
    if start == b"PK\x03\x04":
        try:
            with zipfile.ZipFile(file) as archive:
                return any(Path(name).suffix in PICKLE_SUFFIXES for name in archive.namelist())
        except zipfile.BadZipFile:
            return True  # an archive that cannot be looked into
    return False


def _is_safetensors(file: Path) -> bool:
    """By its suffix, and whole: its header is read."""
    if file.suffix != ".safetensors":
        return False
    try:
        with safe_open(file, "pt"):
            return True
    except SafetensorError:
        return False


def _check_content(file: Path) -> None:
    """UserError unless the file is what its name says and names no place of this machine."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as tensors:
                strings = [("metadata", str(value)) for value in (tensors.metadata() or {}).values()]
        elif file.suffix == ".json":
            strings = _strings(json.loads(file.read_text(encoding="utf-8")))
            if file.name in VOCABULARIES:
                strings = []
        else:
            text = file.read_text(encoding="utf-8")
            strings = []
            if file.suffix == ".py":
                ast.parse(text)
            elif _own_places(text):
                raise UserError(f"{file}: names a place of this machine, {_own_places(text)}; take it out")
        for key, value in strings:
            if PLACE.fullmatch(value) or _own_places(value) or (key == "_name_or_path" and Path(value).exists()):
                raise UserError(f"{file}: {key} names a place of this machine, {value}; export the model again")
    except (SafetensorError, OSError, ValueError, SyntaxError, RecursionError) as error:
        raise UserError(f"{file}: is not what its name says ({one_line(error)}); export the model again") from error


def _strings(value, key: str = "the file") -> Iterator[tuple[str, str]]:
    """Every (key, string) of a JSON value, the pieces of a vocabulary left out."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            if name not in TOKENS:
                yield from _strings(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner, key)


def _own_places(text: str) -> str | None:
    """The home or the working directory, where the text names something in it."""
    for place in (Path.home(), Path.cwd()):
        if len(place.parts) > 1 and f"{place}/" in text:
            return f"{place}/"
    return None
