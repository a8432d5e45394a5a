"""Load a model or a tokenizer from a folder or the Hub, with errors that say what is wrong with it.

A folder is what `ssm-lm export` wrote, the output of a training run, or one checkpoint of it. No code that lies in the
folder is run: the classes are this package's own, and weights are read from safetensors alone.
"""

import contextlib
import json
import logging
import re
import sys
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open

from ..errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
COMPLETE = "complete.json"  # the last file of a checkpoint that the trainer writes
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def load_model(path: str | Path, dtype: str | torch.dtype | None = None):
    """The S4ForCausalLM in a folder, or in a repository of the Hub, in evaluation mode.

    path: a model folder; the output folder of a training run (the final model, else the newest checkpoint in it); a
    checkpoint in it; or a Hub id. dtype: a torch dtype or its name; None keeps the one of the checkpoint. The
    parameters of the state spaces stay float32 in any case.
    Raises UserError, one line, for a missing folder or file, another architecture, damaged or pickled weights, and
    weights that are not those that config.json describes.
    """
    from .. import S4Config, S4ForCausalLM

    dtype = _dtype(dtype)
    source = resolve(path)
    with quiet():
        config = _config(S4Config, source)
        if isinstance(source, Path):
            _check_weights(source)
        try:
            model, found = S4ForCausalLM.from_pretrained(
                source,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # they are refused below, in one line
                output_loading_info=True,
            )
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: the weights cannot be loaded ({one_line(error)})") from error
    _check_fit(source, found)
    return model.eval()


def load_tokenizer(path: str | Path, needs_model: bool = True):
    """The tokenizer beside a model; for a checkpoint without one, that of the training run's output folder.

    needs_model: False takes a folder that holds a tokenizer alone.
    Raises UserError when there is none or it cannot be read.
    """
    from transformers import AutoTokenizer

    is_folder = not needs_model and Path(path).expanduser().is_dir()
    source = Path(path).expanduser() if is_folder else resolve(path)
    if isinstance(source, Path):
        source = _tokenizer_folder(source)
    with quiet():
        try:
            return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        except Exception as error:  # of JSON, of the tokenizer's class, of its Rust part, of the Hub's client
            raise UserError(f"{path}: the tokenizer cannot be loaded ({one_line(error)})") from error


def has_tokenizer(path: str | Path) -> bool:
    """Whether `load_tokenizer` has something to load; a Hub id is taken to have one."""
    source = resolve(path)
    if not isinstance(source, Path):
        return True
    try:
        return bool(_tokenizer_folder(source))
    except UserError:
        return False


def check_vocabulary_fits(tokenizer, model, path: str | Path) -> None:
    """UserError when the tokenizer of `path` has token ids that the model's embedding lacks."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= model.config.vocab_size:
        raise UserError(
            f"{path}: the tokenizer has token ids up to {largest}, the model a vocabulary of "
            f"{model.config.vocab_size}; give the tokenizer that the model was trained with"
        )


def resolve(path: str | Path) -> Path | str:
    """The folder that `path` means, as a Path, or the Hub id that it is, as a str.

    Raises UserError for a path that is no folder and cannot be a Hub id, and for a folder without a model.
    """
    folder = Path(path).expanduser()
    if folder.is_file():
        raise UserError(f"{path}: is a file; give the folder that holds it")
    if not folder.is_dir():
        parts = Path(path).parts
        is_local = str(path).startswith((".", "~", "/")) or len(parts) != 2 or folder.parent.is_dir()
        if is_local or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
            raise UserError(f"{path}: no such folder; give a model folder or a Hub id such as user/name")
        return str(path)
    if (folder / CONFIG).is_file():
        return folder
    checkpoints = [entry for entry in folder.iterdir() if _CHECKPOINT.fullmatch(entry.name) and entry.is_dir()]
    checkpoints = [entry for entry in checkpoints if (entry / CONFIG).is_file()]
    if not checkpoints:
        raise UserError(
            f"{folder / CONFIG}: no such file; give a folder that holds a model, or a training run's output"
        )
    # a run that was killed may leave its last one half written; the trainer's mark says which are whole
    return max(checkpoints, key=lambda entry: ((entry / COMPLETE).is_file(), int(_CHECKPOINT.fullmatch(entry.name)[1])))


@contextlib.contextmanager
def quiet():
    """No progress bars or loading reports, and nothing on stdout, which belongs to what the verbs print."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def one_line(error: BaseException) -> str:
    """The message of an error of some library, as one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _dtype(dtype) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: unknown; choose one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _config(config_class, source: Path | str):
    name = source / CONFIG if isinstance(source, Path) else f"{source}: {CONFIG}"
    try:
        values, _ = config_class.get_config_dict(source)
    except Exception as error:  # OSError for a file that is not there or not JSON; the Hub's client has its own
        raise UserError(f"{name}: cannot be read ({one_line(error)})") from error
    found = values.get("model_type") if isinstance(values, dict) else None
    if found != config_class.model_type:
        raise UserError(
            f"{name}: checkpoint of another architecture: model_type is {found!r}, "
            f"{config_class.model_type!r} is expected"
        )
    try:
        return config_class.from_dict(values)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise UserError(f"{name}: describes no model ({one_line(error.__cause__ or error)})") from error


def _check_weights(folder: Path) -> None:
    """Open every file of weights once: names, header and length are checked before any tensor is read."""
    if (folder / WEIGHTS).is_file():
        files = [folder / WEIGHTS]
    elif (folder / INDEX).is_file():
        try:
            files = sorted({folder / name for name in json.loads((folder / INDEX).read_text())["weight_map"].values()})
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{folder / INDEX}: not an index of weights ({one_line(error)})") from error
    else:
        pickles = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
        pickles = [file.name for file in pickles if file.name != "training_args.bin"]
        if pickles:
            raise UserError(
                f"{folder}: the weights are pickled ({pickles[0]}), and a pickle can run code; "
                f"convert them to {WEIGHTS} first"
            )
        raise UserError(f"{folder / WEIGHTS}: no such file; the folder holds a config without weights")
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: no such file, and {INDEX} names it; copy the folder again")
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: truncated or damaged ({one_line(error)}); copy it again") from error


def _check_fit(source: Path | str, found: dict) -> None:
    """Refuse what transformers reports and passes over: keys too many, too few, or of another shape."""
    mismatched = [
        f"{key} is {_shape(has)}, not {_shape(wants)}" for key, has, wants in sorted(found["mismatched_keys"])
    ]
    for what, keys in (
        ("of another shape", mismatched),
        ("missing", sorted(found["missing_keys"])),
        ("unexpected", sorted(found["unexpected_keys"])),
    ):
        if keys:
            others = f", and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise UserError(f"{source}: the weights do not fit {CONFIG}: {what}: {keys[0]}{others}")


def _shape(shape) -> str:
    return "x".join(map(str, shape))


def _tokenizer_folder(folder: Path) -> Path:
    candidates = [folder, folder.parent] if _CHECKPOINT.fullmatch(folder.resolve().name) else [folder]
    for candidate in candidates:
        if (candidate / "tokenizer.json").is_file():
            return candidate
    raise UserError(f"{folder / 'tokenizer.json'}: no such file; copy the tokenizer's files into the folder")
