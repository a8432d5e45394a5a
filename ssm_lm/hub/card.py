"""The model card: what an exported model is, how to load it, and what was measured, with units and protocol."""

import json
from pathlib import Path

import torch
import transformers

from ..errors import UserError

SHOWN = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "arch",
    "ssm",
    "state_size",
    "ssm_init",
    "discretization",
    "n_ssm",
    "dt_min",
    "dt_max",
    "intermediate_size",
    "hidden_act",
    "tie_word_embeddings",
)
LAYERS = {"s4": "S4 (diagonal plus low rank)", "s4d": "S4D (diagonal)"}
MEASURES = (
    ("token_perplexity", "token perplexity", "tokens of this model's tokenizer"),
    ("word_perplexity", "word perplexity", "words between white space"),
    ("word_perplexity_with_line_ends", "word perplexity, line ends counted", "words and line ends"),
    ("bits_per_byte", "bits per byte", "bytes of UTF-8"),
)


def read_results(path: Path) -> dict:
    """The object that `ssm-lm eval --json` wrote to `path`; UserError where it did not."""
    try:
        results = json.loads(path.expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--results {path}: cannot be read ({' '.join(str(error).split())})") from error
    needed = ("protocol", "split", "dataset", "tokens", *(key for key, _, _ in MEASURES))
    missing = [key for key in needed if not isinstance(results, dict) or key not in results]
    if missing:
        raise UserError(f"--results {path}: has no key {missing[0]}; give a file of `ssm-lm eval --json`")
    return results


def write_card(model, name: str, results: list[dict]) -> str:
    """The text of README.md. name: of the exported folder; results: objects from `read_results`, or none."""
    config = model.config
    parameters = sum(parameter.numel() for parameter in model.parameters())
    embedding = sum(parameter.numel() for parameter in model.get_input_embeddings().parameters())
    parts = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [s4, state-space-model, causal-lm, custom_code]",
        "---",
        "",
        f"# {name}",
        "",
        f"A causal language model whose mixers are {LAYERS.get(config.ssm, config.ssm)} state spaces instead of "
        "attention: training in linear time, generation with a state of constant size. Trained with ssm_lm.",
        "",
        f"{parameters:,} parameters, {embedding:,} of them in the embedding"
        f"{', which the head shares' if config.tie_word_embeddings else ''}; weights in "
        f"{str(model.dtype).removeprefix('torch.')}, those of the state spaces in float32.",
        "",
        "## Load it",
        "",
        "The code of the model lies in this repository, so it has to be allowed to run; read it first.",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'path = "{name}"  # this folder, or USER/{name} on the Hub',
        "tokenizer = AutoTokenizer.from_pretrained(path)",
        "model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)",
        'inputs = tokenizer("Once", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64, do_sample=True)[0]))",
        "```",
        "",
        f"Written with transformers {transformers.__version__} and torch {torch.__version__.split('+')[0]}.",
        "",
        "## Configuration",
        "",
        "| key | value |",
        "|---|---|",
        *(f"| {key} | {getattr(config, key)} |" for key in SHOWN if hasattr(config, key)),
        "",
    ]
    if results:
        parts += ["## Results", "", "| data | split | protocol | measure | value | unit |", "|---|---|---|---|---|---|"]
        for result in results:
            # not "data": where it lay is nobody's business
            row = f"| {result['dataset']} | {result['split']} | {result['protocol']} |"
            parts += [f"{row} {what} | {_number(result[key])} | {unit} |" for key, what, unit in MEASURES]
        parts.append("")
    parts += ["## Licence", "", "The code (the `.py` files) is under the Apache License 2.0.", ""]
    return "\n".join(parts)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.4f}"
