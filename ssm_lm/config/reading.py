"""Reading a training config: a YAML file, then `--key value` from the command line, every key and type checked."""

import difflib
import os
import re
import types
import typing
from pathlib import Path

import yaml

from ..baselines import BASELINES
from ..errors import UserError
from ..extras import need
from .keys import model_keys, training_keys


class _Loader(yaml.SafeLoader):
    """The scalars of YAML 1.2: 1e-3 is a float and `no` is a word; PyYAML's YAML 1.1 has a string and false."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":float"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)$|^[-+]?\d[\d_]*\.\d*$|^[-+]?\.\d+$|^[-+]?\.(inf|Inf)$|^\.nan$"
    ),
    list("-+0123456789."),
)


def read_yaml(path: str | os.PathLike) -> dict:
    """The mapping in a YAML file. Raises UserError, with the line where there is one, if it is not one."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the config {path}: {getattr(error, 'strerror', None) or error}") from error
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else path
        raise UserError(f"{where}: not valid YAML: {getattr(error, 'problem', error)}") from error
    if value is None:
        value = {}
    if not isinstance(value, dict):
        raise UserError(f"{path}: a config is a mapping of keys to values, not a {type(value).__name__}")
    return value


def parse_overrides(words: list[str]) -> dict:
    """`--learning_rate 1e-3 --model.hidden_size=256 --bf16` -> {"learning_rate": 0.001, ...}; "-" may stand for "_"."""
    overrides, position = {}, 0
    while position < len(words):
        word = words[position]
        if not word.startswith("--") or word == "--":
            raise UserError(f"{word!r} stands where a --key was expected; an override is written --key value")
        key, equals, text = word[2:].partition("=")
        position += 1
        if not equals:
            if position < len(words) and not words[position].startswith("--"):
                text = words[position]
                position += 1
            else:
                text = "true"
        try:
            overrides[key.replace("-", "_")] = yaml.load(text, Loader=_Loader)
        except yaml.YAMLError as error:
            raise UserError(f"--{key}: {text!r} is not a value: {getattr(error, 'problem', error)}") from error
    return overrides


def check_keys(values: dict, known: typing.Iterable[str], where: str) -> None:
    """Raise UserError for the first key that is not known, naming the nearest one that is."""
    known = sorted(known)
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(f"{where}: unknown key {key!r}{hint}")


def check_types(values: dict, hints: dict, where: str) -> None:
    """Raise UserError for the first value whose type its key does not take. An int passes for a float."""
    for key, value in values.items():
        allowed = _simple_types(hints[key])
        if allowed is None or type(value) in allowed or (type(value) is int and float in allowed):
            continue
        if isinstance(value, allowed) and not isinstance(value, bool):
            continue
        names = " or ".join(sorted("null" if t is type(None) else t.__name__ for t in allowed))
        raise UserError(f"{where}: {key} must be {names}, not {value!r}")


def _simple_types(hint) -> tuple[type, ...] | None:
    """The plain types that an annotation admits, or None where it is more than a union of them."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        parts = [_simple_types(part) for part in typing.get_args(hint)]
        return None if None in parts else tuple(t for part in parts for t in part)
    origin = typing.get_origin(hint) or hint
    return (origin,) if isinstance(origin, type) else None


def read_train_config(path: str, overrides: dict) -> dict:
    """A checked config: keys of S4TrainingArguments, with `model` as a mapping of keys of S4Config or of a baseline.

    `model` and `deepspeed` may name files, looked for from the working directory, beside the config and in the folders
    above it; `model.KEY` sets one key of the model, in the config as on the command line. An `init_from` of the command
    line takes the place of the config's model.
    Raises UserError for an unknown key, a value of the wrong type, a missing file.
    """
    return checked_values(read_yaml(path), overrides, path, path)


def checked_values(values: dict, overrides: dict, path: str, where: str) -> dict:
    """`read_train_config` for values that are read already. path: the file that they are of, beside which others are
    looked for; where: what an error names. values is left as it is.
    """
    values = dict(values)
    own = {key: values.pop(key) for key in list(values) if key.startswith("model.")}
    if "model" not in overrides and not overrides.get("init_from"):  # of the config's model, which has gone then
        overrides = own | overrides
    model = values.pop("model", None) or {}
    if "model" in overrides:
        model = overrides["model"] or {}
    elif overrides.get("init_from"):
        model = {}
    if isinstance(model, str):
        model_path = find_file(model, path, "model")
        model = read_yaml(model_path)
        model_where = str(model_path)
    else:
        model_where = f"{where}, model"
    if not isinstance(model, dict):
        raise UserError(f"{where}: model must be a mapping or the path of a YAML file, not {model!r}")
    model = dict(model)
    for key, value in overrides.items():
        if key.startswith("model."):
            model[key.removeprefix("model.")] = value
        elif key != "model":
            values[key] = value

    check_keys(values, training_keys(), where)
    if "type" in model and model["type"] not in BASELINES:
        raise UserError(
            f"{model_where}: type {model['type']!r} is unknown; a model of transformers is one of "
            f"{', '.join(BASELINES)}, and ours has no type"
        )
    check_keys(model, model_keys(model.get("type")), model_where)
    need("a training config", "train", "accelerate")
    from .arguments import S4TrainingArguments  # transformers, which takes seconds: what is wrong above is said before

    check_types(values, typing.get_type_hints(S4TrainingArguments), where)
    if values.get("deepspeed") is not None and isinstance(values["deepspeed"], str):
        values["deepspeed"] = str(find_file(values["deepspeed"], path, "deepspeed"))
    return values | {"model": model}


def find_file(name: str, config_path: str, key: str) -> Path:
    """A file that a config names, relative to the working directory, to the config or to a folder above it."""
    for candidate in (Path(name), *(folder / name for folder in Path(config_path).absolute().parents)):
        if candidate.is_file():
            return candidate
    raise UserError(f"{config_path}: {key} names {name}, which is not there; give a path from here or from the config")
