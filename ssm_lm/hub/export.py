"""`ssm-lm export`: a folder that AutoModelForCausalLM loads where ssm_lm is not installed.

Weights in safetensors, the configuration, the tokenizer, the model's own code and a model card; nothing of the
training. The folder is written beside its place under another name and renamed when complete.
"""

import argparse
import shutil
from pathlib import Path

from .. import modeling
from ..errors import UserError
from ..files import new_folder
from . import card
from .load import DTYPES, check_vocabulary_fits, load_model, load_tokenizer, one_line, quiet

AUTO_MAP = {
    "AutoConfig": "configuration_s4.S4Config",
    "AutoModel": "modeling_s4.S4Model",
    "AutoModelForCausalLM": "modeling_s4.S4ForCausalLM",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a training run's output, a checkpoint or a model")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="the folder to write; must be new")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the weights; state spaces stay float32 (default: as they are)"
    )
    parser.add_argument("--tokenizer", metavar="PATH", help="the tokenizer's folder (default: that of the checkpoint)")
    parser.add_argument(
        "--results",
        type=Path,
        action="append",
        metavar="FILE",
        help="from `eval --json`, for the card; may be repeated",
    )


def run(args: argparse.Namespace) -> None:
    """Export as the arguments say."""
    export(args.checkpoint, args.output, dtype=args.dtype, tokenizer=args.tokenizer, results=args.results or ())
    print(f"{args.output}: done; load it with AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)")


def export(checkpoint, output, *, dtype=None, tokenizer=None, results=()) -> Path:
    """Write the model in `checkpoint` to the new folder `output` and return its path.

    dtype: of the weights, None keeps it. tokenizer: a folder or Hub id, None takes the checkpoint's.
    results: JSON files of `ssm-lm eval` whose numbers the card is to show.
    Raises UserError for a bad source and for an output that holds something, which is left as it is.
    """
    output = Path(output).expanduser()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output}: exists and is not an empty folder; choose another")
    results = [card.read_results(Path(file)) for file in results]
    model = load_model(checkpoint, dtype)
    vocabulary = tokenizer or checkpoint
    tokenizer = load_tokenizer(vocabulary, needs_model=tokenizer is None)
    check_vocabulary_fits(tokenizer, model, vocabulary)

    try:
        with new_folder(output) as partial:
            write(model, tokenizer, partial, card.write_card(model, output.resolve().name, results))
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({one_line(error)}); choose another place") from error
    return output


def write(model, tokenizer, folder: Path, readme: str) -> None:
    """Write every file of the exported model into `folder`."""
    model.config.auto_map = dict(AUTO_MAP)
    for key in ("is_local", "local_files_only"):  # how it was loaded here
        tokenizer.init_kwargs.pop(key, None)
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    for file in code_files():
        shutil.copyfile(file, folder / file.name)
    (folder / "README.md").write_text(readme, encoding="utf-8")


def code_files() -> list[Path]:
    """The model's own code: every module of ssm_lm.modeling, which is written to work as a flat folder."""
    return sorted(file for file in Path(modeling.__file__).parent.glob("*.py") if file.name != "__init__.py")
