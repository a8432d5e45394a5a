"""`ssm-lm convert`: a checkpoint of state-spaces/s4 as a folder that S4ForCausalLM.from_pretrained loads.

The file may be a state_dict (.pt) or a Lightning checkpoint (.ckpt) of the WikiText-103 language model; what is in it
is read in `upstream`. A pickle is only ever loaded with weights_only=True, so that nothing in it can run.
"""

import argparse
import re
import warnings
from pathlib import Path

import torch

from ..errors import UserError, one_line
from ..files import new_folder
from ..loading.folder import quiet
from ..loading.tokenizer import load_tokenizer
from .upstream import VERSIONS, translate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument(
        "checkpoint", metavar="UPSTREAM.pt", help="a .pt or .ckpt file of state-spaces/s4's WikiText-103"
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="the folder to write; must be new")
    parser.add_argument(
        "--tokenizer", metavar="PATH", help="the vocabulary that the model was trained with, to lie beside it"
    )
    parser.add_argument(
        "--version", choices=("auto", *VERSIONS), default="auto", help="of the code that wrote it (default: auto)"
    )
    parser.add_argument(
        "--l-max", type=int, metavar="N", help="the length of its kernels, for a file that does not say (v1)"
    )


def run(args: argparse.Namespace) -> None:
    """Convert as the arguments say."""
    model = convert(args.checkpoint, args.output, args.tokenizer, args.version, args.l_max)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{args.output}: done, {parameters:,} parameters, vocabulary {model.config.vocab_size:,}")
    if args.tokenizer is None:
        print(
            "the vocabulary is not in the checkpoint: give --tokenizer, or copy one into the folder, to generate text"
        )


def convert(checkpoint, output, tokenizer=None, version: str = "auto", l_max: int | None = None):
    """Write the model in the file `checkpoint` to the new folder `output`, and return it (in evaluation mode).

    tokenizer: a folder or Hub id, or None. version: "auto" or one of VERSIONS. l_max: see `upstream.translate`.
    Raises UserError for a bad file, a vocabulary of another size, and an output that holds something.
    """
    output = Path(output).expanduser()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output}: exists and is not an empty folder; choose another")
    if l_max is not None and l_max < 1:
        raise UserError(f"--l-max must be positive, not {l_max}")
    config, weights = translate(read_tensors(checkpoint), str(checkpoint), version, l_max)
    if tokenizer is not None:
        path, tokenizer = tokenizer, load_tokenizer(tokenizer, needs_model=False)
        if len(tokenizer) != config["vocab_size"]:
            raise UserError(
                f"--tokenizer {path}: has {len(tokenizer):,} tokens and the model {config['vocab_size']:,}; every id "
                "would mean another word: give the vocabulary of the training, <eos> and <unk> included"
            )
        config["bos_token_id"] = config["eos_token_id"] = tokenizer.eos_token_id
    model = build(config, weights)

    try:
        with new_folder(output) as partial, quiet():
            model.save_pretrained(partial)
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({one_line(error)}); choose another place") from error
    return model


def build(config: dict, weights: dict[str, torch.Tensor]):
    """The S4ForCausalLM with these weights, every one of them."""
    from .. import S4Config, S4ForCausalLM

    with torch.device("meta"):  # nothing is drawn that would be overwritten
        model = S4ForCausalLM(S4Config(**config))
    model.load_state_dict({key: value.float().clone() for key, value in weights.items()}, strict=True, assign=True)
    model.tie_weights()
    return model.eval()


def read_tensors(path) -> dict[str, torch.Tensor]:
    """The state_dict in a .pt or .ckpt file; UserError, one line, for a file that is not one or would run code."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a .pt or .ckpt file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle's dialect
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of the unpickler, of the archive, of the file system: damage raises many types
        forbidden = re.search(r"GLOBAL ([\w.]+)", str(error))
        if forbidden:
            raise UserError(
                f"{path}: holds more than tensors ({forbidden[1]}), which could run code, and is not loaded; in the "
                "code that wrote it, save the state_dict alone"
            ) from error
        raise UserError(f"{path}: no checkpoint, or truncated, or damaged; copy it again") from error
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict) or not loaded or not all(isinstance(v, torch.Tensor) for v in loaded.values()):
        raise UserError(f"{path}: holds no state_dict: a mapping of names to tensors is needed")
    return loaded
