"""What a run says about how it was started: config.yaml, every key with where its value is from, and starts.jsonl.

config.yaml is the whole config, so that `ssm-lm train RUN/config.yaml` is the same run though a default may have
changed since; it is written anew at every start. starts.jsonl gets one line a start: when, where, by which command,
with which versions.
"""

import dataclasses
import json
import platform
import socket
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ..config.keys import model_keys
from .schedule import curve, warmup_steps

CONFIG_FILE, STARTS_FILE = "config.yaml", "starts.jsonl"
LIBRARIES = (
    *("ssm_lm", "torch", "transformers", "accelerate", "deepspeed", "datasets", "tokenizers", "safetensors", "numpy"),
    "triton",
)
ELSEWHERE = ("model", "deepspeed", "allow_changes")  # keys that stand in another form; a word for one start alone
OF_THE_DATA = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "input_size")


class Setting(NamedTuple):
    """The value of a key, and where it is from: "command line", "config", "data", "other keys" or "default"."""

    key: str
    value: Any
    source: str


# ---- the config


def resolved_settings(values: dict, plan, given: frozenset) -> tuple[list[Setting], list[Setting]]:
    """(the keys of the model, the other keys) of a run, each with its value, as a config may say it.

    values: a checked config; given: the keys that the command line has said. The model's are of an `init_from`, and
    then there are none here; of one of transformers' they are what was said.
    """
    from ..config.arguments import S4TrainingArguments

    training = []
    for field in dataclasses.fields(S4TrainingArguments):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if not field.name.startswith("_") and field.name not in ELSEWHERE:
            training.append(_setting(field.name, values, default, given))
    followed = {"max_steps": plan.args.max_steps, "ssm_learning_rate": plan.args.ssm_learning_rate}
    training = [
        Setting(key, followed[key], "other keys")
        if key in followed and followed[key] != value
        else Setting(key, value, of)
        for key, value, of in training
    ]
    engine = values.get("deepspeed")
    if isinstance(engine, str):
        engine = json.loads(Path(engine).read_text(encoding="utf-8"))  # what the file says now
    source = _setting("deepspeed", values, None, given).source
    return _model_settings(values["model"], plan.task.config, given), [*training, Setting("deepspeed", engine, source)]


def _setting(key: str, values: dict, default, given: frozenset) -> Setting:
    source = "command line" if key in given else "config" if key in values else "default"
    return Setting(key, values.get(key, default), source)


def _model_settings(said: dict, config, given: frozenset) -> list[Setting]:
    if not said or "type" in said:
        return [Setting(key, value, "config") for key, value in said.items()]
    found = []
    for key in model_keys():
        value, default = getattr(config, key), getattr(type(config), key)
        if f"model.{key}" in given or "model" in given:
            source = "command line"
        elif key in said:
            source = "config"
        elif value == default:
            source = "default"
        else:
            source = "data" if key in OF_THE_DATA else "other keys"
        found.append(Setting(key, list(value) if isinstance(value, tuple) else value, source))
    return found


def config_text(settings: tuple[list[Setting], list[Setting]], where: str) -> str:
    """The settings as a YAML file, what was said before what is by default."""
    model, training = settings
    lines = [f"# config: {where}"]
    if model:
        lines += ["model:", *(f"  {_line(setting)}" for setting in _said_first(model))]
    return "\n".join([*lines, *map(_line, _said_first(training))]) + "\n"


def _said_first(settings: list[Setting]) -> list[Setting]:
    return sorted(settings, key=lambda setting: setting.source == "default")


def _line(setting: Setting) -> str:
    value = yaml.safe_dump([setting.value], default_flow_style=True, width=1 << 20, sort_keys=False).strip()[1:-1]
    return f"{setting.key + ': ' + value:<48}  # {setting.source}"


# ---- the schedule


def schedule_text(identity: dict) -> str:
    """The learning rates of five steps: the first, the end of the warm-up, halves of the rest, the last."""
    last, warm = identity["max_steps"], min(warmup_steps(identity), identity["max_steps"])
    rest = max(0, last - 1 - warm)
    steps = sorted({0, warm, warm + rest // 2, warm + 3 * rest // 4, last - 1} & set(range(last)))
    factor = curve(identity)
    own = identity["ssm_learning_rate"] or identity["learning_rate"]
    shown = [f"{step + 1}: {identity['learning_rate'] * factor(step):.2e} / {own * factor(step):.2e}" for step in steps]
    return f"schedule  {identity['lr_scheduler_type']}, rate / of the state spaces, at step {', '.join(shown)}"


# ---- the start


def write_record(output_dir: Path, text: str, start: dict) -> None:
    """Write config.yaml and add a line to starts.jsonl. Raises OSError."""
    (output_dir / CONFIG_FILE).write_text(text, encoding="utf-8")
    with open(output_dir / STARTS_FILE, "a", encoding="utf-8") as file:
        file.write(json.dumps(start) + "\n")


def describe_start(plan, command: str) -> dict:
    """When, where, by which command and with which versions a run is started, and from which step."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": socket.gethostname(),
        "command": command,
        "ranks": plan.args.world_size,
        "step": plan.checkpoint_step or 0,
        "commit": commit(),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of Python and of the libraries that a run depends on, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit of the package's code, with "+" where files of it were changed since; None outside git."""
    folder = Path(__file__).parents[1]

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()

    try:
        git(
            "ls-files", "--error-unmatch", "__init__.py"
        )  # a package that lies in somebody else's repository is not of it
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None
