"""Load a model from a folder or the Hub, with errors that say what is wrong with it.

A folder is what `ssm-lm export` wrote, the output of a training run, or one checkpoint of it. No code that lies in the
folder is run: the classes are this package's own, or transformers' for a baseline, and weights are read from
safetensors alone. Before anything is
allocated, the model that config.json describes is held against the headers of the weights: see weights.py.
"""

import dataclasses
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError

from ..baselines import BASELINES, baseline_classes
from ..errors import UserError, one_line
from ..hub_access import asking_the_hub
from ..internals.deepspeed import put_values
from .folder import CONFIG, INDEX, quiet, read_json, resolve
from .weights import check_counts, check_fit, check_loaded, flat_weights, read_headers

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GENERATION = "generation_config.json"
CAUSAL_LM, CLASSIFIER = "S4ForCausalLM", "S4ForSequenceClassification"
# keys of config.json that would have transformers read other files or other classes, and switches of a single forward
IGNORED = (
    *("auto_map", "transformers_weights", "fusion_config", "distributed_config"),
    *("output_hidden_states", "output_attentions", "return_dict"),
)


def load_model(path: str | Path, dtype: str | torch.dtype | None = None, kinds: tuple[str, ...] = (CAUSAL_LM,)):
    """The model in a folder, or in a repository of the Hub, in evaluation mode.

    path: a model folder; the output folder of a training run (the final model, else the newest checkpoint in it); a
    checkpoint in it; or a Hub id. dtype: a torch dtype or its name; None keeps the one of the checkpoint. The
    parameters of the state spaces stay float32 in any case. kinds: the classes that the caller can use.
    Raises UserError, one line, for a missing folder or file, another architecture, damaged or pickled weights, and
    weights that are not those that config.json describes.
    """
    dtype = _dtype(dtype)
    folder, cls, config = find_model(path, kinds)
    with quiet():
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
    check_loaded(folder, found)
    return model.eval()


def find_model(path: str | Path, kinds: tuple[str, ...] = (CAUSAL_LM,)) -> tuple[Path, type, object]:
    """(folder, class, config) of what `load_model` loads; no tensor is read. Raises UserError as that does."""
    folder = resolve(path)
    if isinstance(folder, str):
        folder = _download(folder, (CONFIG, GENERATION, "*.safetensors", INDEX))
    with quiet():
        return folder, *check_folder(folder, kinds)


def fill_parts(model, folder: Path) -> None:
    """Give a model that `built_in_parts` made the weights of a folder, float32; a rank reads its own part of each.

    The folder is one that `find_model` has found to fit.
    """
    from transformers import GenerationConfig

    values = dict(model.named_buffers()) | dict(model.named_parameters(remove_duplicate=False))
    prefix = f"{model.base_model_prefix}."
    with torch.no_grad(), quiet():
        for key, read in flat_weights(folder).items():
            put_values(values[key if key in values else prefix + key], read)
        if (folder / GENERATION).is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)


def check_folder(folder: Path, kinds: tuple[str, ...] = (CAUSAL_LM, CLASSIFIER)) -> tuple[type, object]:
    """(class, config) of the model in a folder, whose weights fit it; no tensor is read and none is allocated.

    Raises UserError as `load_model` does.
    """
    from ..auto import modeling_s4

    values = read_json(folder / CONFIG)
    baseline = _baseline(values)
    _check_kind_of_file(folder, values, values["model_type"] if baseline else modeling_s4.S4Config.model_type)
    headers = read_headers(folder)
    check_counts(folder, values, headers)
    if baseline:
        values, _ = baseline[0].get_config_dict(folder)  # an infinity is written as an object
    config = _config(baseline[0] if baseline else modeling_s4.S4Config, folder, values)
    named = config.architectures if isinstance(config.architectures, list) else ()
    kind = CLASSIFIER if not baseline and CLASSIFIER in named else CAUSAL_LM
    if kind not in kinds:
        raise UserError(f"{folder}: holds {kind}, and {' or '.join(kinds)} is needed here")
    cls = baseline[1] if baseline else {model.__name__: model for model, *_ in modeling_s4.MODELS}[kind]
    try:
        with torch.device("meta"):
            model = cls(config)
        model.tie_weights()
    except Exception as error:  # about a key, about the size of a tensor, about the name of an activation
        raise UserError(f"{folder / CONFIG}: describes no model ({one_line(error)})") from error
    check_fit(folder, model, headers)
    return cls, config


def _baseline(values: dict) -> tuple[type, type] | None:
    """(the config's class, the language model's) of a baseline that was saved as one, else None."""
    kind, architectures = values.get("model_type"), values.get("architectures")
    if isinstance(kind, str) and kind in BASELINES and architectures == [BASELINES[kind][1]]:
        return baseline_classes(kind)
    return None


def _dtype(dtype) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: unknown; choose one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _download(repo: str, patterns: tuple[str, ...]) -> Path:
    """The folder in the cache with these files of a repository."""
    from huggingface_hub import snapshot_download

    try:
        with asking_the_hub():
            return Path(snapshot_download(repo, allow_patterns=list(patterns)))
    except Exception as error:  # of the Hub's client and of the network under it
        raise UserError(f"{repo}: {CONFIG}: cannot be read ({one_line(error)})") from error


def _check_kind_of_file(folder: Path, values: dict, model_type: str) -> None:
    found = values.get("model_type")
    if found != model_type:
        raise UserError(
            f"{folder / CONFIG}: checkpoint of another architecture: model_type is {found!r}, "
            f"{model_type!r} is expected"
        )
    if values.get("quantization_config") is not None:
        raise UserError(f"{folder / CONFIG}: the weights are quantised; give the model that they were made of")


def _config(config_class, folder: Path, values: dict):
    """The config of these values, less those that name a method of it or another file."""
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
