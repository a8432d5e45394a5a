"""Load a model or a tokenizer from a folder or the Hub, with errors that say what is wrong with it.

A folder is what `ssm-lm export` wrote, the output of a training run, or one checkpoint of it. No code that lies in the
folder is run: the classes are this package's own, and weights are read from safetensors alone. Before anything is
allocated, the model that config.json describes is held against the names, shapes and dtypes in the headers of the
weights, so that no number in a file can ask for more memory or time than its weights are worth.
"""

import contextlib
import dataclasses
import json
import logging
import re
import sys
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open

from ..errors import UserError, one_line

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
CAUSAL_LM, CLASSIFIER = "S4ForCausalLM", "S4ForSequenceClassification"
LARGEST_JSON = 64 << 20  # bytes of a config.json or an index; a long one has thousands
FLOATS = ("F64", "F32", "F16", "BF16")  # as headers of safetensors call what a model's weights are
# keys of config.json that would have transformers read other files or other classes, and switches of a single forward
IGNORED = (
    *("auto_map", "transformers_weights", "fusion_config", "distributed_config"),
    *("output_hidden_states", "output_attentions", "return_dict"),
)
COMPLETE = "complete.json"  # the last file of a checkpoint that the trainer writes
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def load_model(path: str | Path, dtype: str | torch.dtype | None = None, kinds: tuple[str, ...] = (CAUSAL_LM,)):
    """The model in a folder, or in a repository of the Hub, in evaluation mode.

    path: a model folder; the output folder of a training run (the final model, else the newest checkpoint in it); a
    checkpoint in it; or a Hub id. dtype: a torch dtype or its name; None keeps the one of the checkpoint. The
    parameters of the state spaces stay float32 in any case. kinds: the classes that the caller can use.
    Raises UserError, one line, for a missing folder or file, another architecture, damaged or pickled weights, and
    weights that are not those that config.json describes.
    """
    dtype = _dtype(dtype)
    folder = resolve(path)
    if isinstance(folder, str):
        folder = _download(folder, (CONFIG, "generation_config.json", "*.safetensors", INDEX))
    with quiet():
        cls, config = check_folder(folder, kinds)
        try:
            model, found = cls.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # they are refused below, in one line
                output_loading_info=True,
            )
        except Exception as error:  # of a dozen libraries, about any file of the folder
            raise UserError(f"{path}: the model cannot be loaded ({one_line(error)})") from error
    _check_loaded(folder, found)
    return model.eval()


def check_folder(folder: Path, kinds: tuple[str, ...] = (CAUSAL_LM, CLASSIFIER)) -> tuple[type, object]:
    """(class, config) of the model in a folder, whose weights fit it; no tensor is read and none is allocated.

    Raises UserError as `load_model` does.
    """
    config_class, classes = _classes()
    values = _read_config(folder, config_class.model_type)
    headers = _headers(folder)
    _check_counts(folder, values, headers)
    config = _config(config_class, folder, values)
    kind = CLASSIFIER if CLASSIFIER in (config.architectures or ()) else CAUSAL_LM
    if kind not in kinds:
        raise UserError(f"{folder}: holds {kind}, and {' or '.join(kinds)} is needed here")
    try:
        with torch.device("meta"):
            model = classes[kind](config)
        model.tie_weights()
    except Exception as error:  # about a key, about the size of a tensor, about the name of an activation
        raise UserError(f"{folder / CONFIG}: describes no model ({one_line(error)})") from error
    _check_fit(folder, model, headers)
    return classes[kind], config


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
        except BaseException as error:  # of JSON, of the tokenizer's class, of its Rust part, of the Hub's client
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # Rust's
                raise
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


def _dtype(dtype) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: unknown; choose one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _classes() -> tuple[type, dict[str, type]]:
    from .. import S4Config, S4ForCausalLM, S4ForSequenceClassification

    return S4Config, {CAUSAL_LM: S4ForCausalLM, CLASSIFIER: S4ForSequenceClassification}


def _download(repo: str, patterns: tuple[str, ...]) -> Path:
    """The folder in the cache with these files of a repository."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, allow_patterns=list(patterns)))
    except Exception as error:  # of the Hub's client and of the network under it
        raise UserError(f"{repo}: {CONFIG}: cannot be read ({one_line(error)})") from error


def _read_json(file: Path) -> dict:
    """The object in a JSON file; UserError for one that is too large, too deep, or something else."""
    try:
        if file.stat().st_size > LARGEST_JSON:
            raise UserError(f"{file}: cannot be read: larger than {LARGEST_JSON >> 20} MiB")
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read ({one_line(error)})") from error
    if not isinstance(values, dict):
        raise UserError(f"{file}: cannot be read: holds {type(values).__name__}, not an object")
    return values


def _read_config(folder: Path, model_type: str) -> dict:
    values = _read_json(folder / CONFIG)
    found = values.get("model_type")
    if found != model_type:
        raise UserError(
            f"{folder / CONFIG}: checkpoint of another architecture: model_type is {found!r}, "
            f"{model_type!r} is expected"
        )
    if values.get("quantization_config") is not None:
        raise UserError(f"{folder / CONFIG}: the weights are quantised; give the model that they were made of")
    return values


def _config(config_class, folder: Path, values: dict):
    """The S4Config of these values, less those that name a method of it or another file."""
    known = {field.name for field in dataclasses.fields(config_class)} | {"num_labels", "torch_dtype"}
    values = {
        key: value
        for key, value in values.items()
        if key not in IGNORED and (key in known or not (key.startswith("_") or hasattr(config_class, key)))
    }
    try:
        config = config_class.from_dict(values)
    except Exception as error:  # StrictDataclassError, or whatever a value of the wrong kind leads to
        cause = error.__cause__ if isinstance(error, StrictDataclassError) else None
        raise UserError(f"{folder / CONFIG}: describes no model ({one_line(cause or error)})") from error
    if config.dtype not in (None, torch.float64, *DTYPES.values()):
        raise UserError(f"{folder / CONFIG}: dtype is {config.dtype}; choose one of {', '.join(DTYPES)}")
    return config


def _headers(folder: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """{name: (shape, dtype)} of all weights, from the headers of the files; UserError for a damaged one."""
    if (folder / WEIGHTS).is_file():
        named = None
        files = [folder / WEIGHTS]
    elif (folder / INDEX).is_file():
        named = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
            raise UserError(f"{folder / INDEX}: not an index of weights: weight_map maps names to files")
        files = [folder / name for name in sorted(set(named.values()))]
        for file in files:
            if file.parent != folder or file.suffix != ".safetensors":
                raise UserError(f"{folder / INDEX}: names {file.name!r}, which is no safetensors file of the folder")
    else:
        pickles = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
        pickles = [file.name for file in pickles if file.name != "training_args.bin"]
        if pickles:
            raise UserError(
                f"{folder}: the weights are pickled ({pickles[0]}), and a pickle can run code; "
                f"convert them to {WEIGHTS} first"
            )
        raise UserError(f"{folder / WEIGHTS}: no such file; the folder holds a config without weights")
    headers = {}
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: no such file, and {INDEX} names it; copy the folder again")
        try:
            with safe_open(file, "pt") as tensors:  # checks the header against the length of the file
                for key in tensors.keys():
                    tensor = tensors.get_slice(key)
                    headers[key] = tuple(tensor.get_shape()), tensor.get_dtype()
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: truncated or damaged ({one_line(error)}); copy it again") from error
    if named is not None and named.keys() != headers.keys():
        key = min(named.keys() ^ headers.keys())
        raise UserError(f"{folder / INDEX}: {key!r} is not in both the index and the files; copy the folder again")
    return headers


def _check_counts(folder: Path, values: dict, headers: dict) -> None:
    """Refuse counts that the weights cannot have: building the model would loop over them."""
    largest = max((size for shape, _ in headers.values() for size in shape), default=0)
    for key, limit in (
        ("num_hidden_layers", len(headers)),
        ("adaptive_cutoffs", len(headers)),
        ("adaptive_div_val", largest),
        ("num_labels", largest),
    ):
        value = values.get(key)
        value = len(value) if isinstance(value, list) else value
        if isinstance(value, (int, float)) and value > max(limit, 4):
            raise UserError(f"{folder}: the weights do not fit {CONFIG}: {key} is too large, for they hold {limit}")


def _check_fit(folder: Path, model, headers: dict) -> None:
    """Hold the headers of the weights against the parameters and buffers of the model, which is on the meta device."""
    wanted = model.state_dict(keep_vars=True)
    if not any(key.startswith(f"{model.base_model_prefix}.") for key in headers):  # saved from the base model
        headers = {f"{model.base_model_prefix}.{key}": header for key, header in headers.items()}
    present = {id(wanted[key]) for key in headers if key in wanted}  # tied parameters are one
    _refuse(folder, "of dtype", [f"{key} ({dtype})" for key, (_, dtype) in headers.items() if dtype not in FLOATS])
    mismatched = [
        f"{key} is {_shape(shape)}, not {_shape(wanted[key].shape)}"
        for key, (shape, _) in headers.items()
        if key in wanted and shape != tuple(wanted[key].shape)
    ]
    _refuse(folder, "of another shape", mismatched)
    _refuse(folder, "missing", [key for key, tensor in wanted.items() if id(tensor) not in present])
    _refuse(folder, "unexpected", headers.keys() - wanted.keys())


def _check_loaded(folder: Path, found: dict) -> None:
    """Refuse what transformers reports and passes over: it draws such parameters at random."""
    _refuse(folder, "of another shape", [key for key, *_ in found["mismatched_keys"]])
    _refuse(folder, "missing", found["missing_keys"])
    _refuse(folder, "unexpected", found["unexpected_keys"])


def _refuse(folder: Path, what: str, keys) -> None:
    if keys:
        others = f", and {len(keys) - 1} more" if len(keys) > 1 else ""
        raise UserError(f"{folder}: the weights do not fit {CONFIG}: {what}: {min(keys)}{others}")


def _shape(shape) -> str:
    return "x".join(map(str, shape))


def _tokenizer_folder(folder: Path) -> Path:
    candidates = [folder, folder.parent] if _CHECKPOINT.fullmatch(folder.resolve().name) else [folder]
    for candidate in candidates:
        if (candidate / "tokenizer.json").is_file():
            return candidate
    raise UserError(f"{folder / 'tokenizer.json'}: no such file; copy the tokenizer's files into the folder")
