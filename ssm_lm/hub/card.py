"""The model card: what an exported model is, how to load it, and what was measured, with units and protocol."""

import json
from pathlib import Path

import torch
import transformers

from ..baselines import BASELINES, is_baseline
from ..errors import UserError, one_line
from ..loading.model import CLASSIFIER
from ..runs.curves import PICTURE

CARD = "README.md"
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
    "conv_size",
    "expand",
    "head_dim",
    "selective_dt",
    "intermediate_size",
    "hidden_act",
    "norm",
    "tie_word_embeddings",
)
OWN_CODE = "The code of the model lies in this repository, so it has to be allowed to run; read it first."
INT8 = "The projections are in int8 instead, torchao's weight-only form: this needs `pip install torchao accelerate`."
LAYERS = {
    "s4": "S4 (diagonal plus low rank)",
    "s4d": "S4D (diagonal)",
    "s5": "S5 (diagonal, one for all channels)",
    "ssd": "SSD (diagonal, B and C from the token)",
}
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
        raise UserError(f"--results {path}: cannot be read ({one_line(error)})") from error
    needed = ("protocol", "split", "dataset", "tokens", *(key for key, _, _ in MEASURES))
    missing = [key for key in needed if not isinstance(results, dict) or key not in results]
    if missing:
        raise UserError(f"--results {path}: has no key {missing[0]}; give a file of `ssm-lm eval --json`")
    return results


def write_card(
    model,
    name: str,
    results: list[dict],
    *,
    license: str | None = None,
    trained_on: str | None = None,
    made: dict[str, str] | None = None,
    curve: list[tuple[int, float]] = (),
    picture: bool = False,
    int8: bool = False,
) -> str:
    """The text of README.md. name: of the exported folder; results: objects from `read_results`, or none.

    license: of the weights, as the Hub calls it; trained_on: the data, in the author's words; made, curve: what
    making.py has found; picture: whether its curves lie beside the card, as PICTURE. int8: whether
    the weights beside the card are those of int8.py; model: before that.
    """
    config = model.config
    is_classifier = type(model).__name__ == CLASSIFIER
    parameters = sum(parameter.numel() for parameter in model.parameters())
    vocabulary = model.get_input_embeddings()
    embedding = 0 if vocabulary is None else sum(parameter.numel() for parameter in vocabulary.parameters())
    shared = ", which the head shares" if config.tie_word_embeddings and not is_classifier else ""
    tag = "text-classification" if is_classifier else "text-generation"
    baseline = is_baseline(config)
    kind = "classification" if is_classifier else "causal-lm"
    parts = [
        "---",
        "library_name: transformers",
        *([] if embedding == 0 else [f"pipeline_tag: {tag}"]),
        f"tags: [{f'{config.model_type}, {kind}' if baseline else f's4, state-space-model, {kind}, custom_code'}]",
        *([] if license is None else [f"license: {license}"]),
        "---",
        "",
        f"# {name}",
        "",
        _baseline(config) if baseline else _state_space(config, is_classifier),
        "",
        f"{parameters:,} parameters, {embedding:,} of them in the embedding{shared}; weights in "
        f"{str(model.dtype).removeprefix('torch.')}{'' if baseline else ', those of the state spaces in float32'}.",
        "",
        "## Load it",
        "",
        *([] if baseline else [OWN_CODE, ""]),
        *([INT8, ""] if int8 else []),
        "```python",
        *(_load_classifier(name, config) if is_classifier else _load_language_model(name, not baseline)),
        "```",
        "",
        *_strategies(model),
        *([] if baseline else _projections(model)),
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
            # "dataset" is its name; "data" would publish where it lay on this machine
            row = f"| {result['dataset']} | {result['split']} | {result['protocol']} |"
            parts += [f"{row} {what} | {_number(result[key])} | {unit} |" for key, what, unit in MEASURES]
        parts.append("")
    if made:
        parts += ["## How it was made", "", "| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in made.items()), ""]
    if curve:
        steps, values = ([f"{point[i]:,.0f}" if i == 0 else f"{point[i]:,.2f}" for point in curve] for i in (0, 1))
        parts += [f"| step | {' | '.join(steps)} |", "|---" * (len(curve) + 1) + "|"]
        parts += [f"| validation perplexity | {' | '.join(values)} |", ""]
    if picture:
        parts += [f"![What the run has logged]({PICTURE})", ""]
    if not is_classifier:
        parts += ["## Use and limits", "", *_use(baseline, int8), ""]
    if trained_on is not None:
        parts += ["## Training data", "", " ".join(trained_on.split()), ""]
    weights = "" if license is None else f" The weights: {license}."
    parts += ["## Licence", "", f"The code (the `.py` files) is under the Apache License 2.0.{weights}", ""]
    return "\n".join(parts)


def _state_space(config, is_classifier: bool) -> str:
    return (
        f"A {'sequence classifier' if is_classifier else 'causal language model'} whose mixers are "
        f"{LAYERS.get(config.ssm, config.ssm)} state spaces instead of attention: training in linear time"
        f"{'' if is_classifier else ', generation with a state of constant size'}. Trained with ssm_lm."
    )


def _baseline(config) -> str:
    return (
        f"A causal language model of transformers' class {BASELINES[config.model_type][1]}. Trained with ssm_lm, as "
        "what its state space models are compared with."
    )


def _load_language_model(name: str, own_code: bool) -> list[str]:
    trust = ", trust_remote_code=True" if own_code else ""
    return [
        "from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast",
        "",
        f'path = "{name}"  # this folder, or USER/{name} on the Hub',
        "tokenizer = PreTrainedTokenizerFast.from_pretrained(path)",
        f"model = AutoModelForCausalLM.from_pretrained(path{trust})",
        'inputs = tokenizer("Once", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64, do_sample=True)[0]))",
    ]


def _load_classifier(name: str, config) -> list[str]:
    inputs = "input_ids=torch.tensor([[1, 2, 3]])"
    if config.input_size is not None:
        inputs = f"inputs_embeds=torch.zeros(1, 100, {config.input_size})"
    return [
        "import torch",
        "from transformers import AutoModelForSequenceClassification",
        "",
        f'path = "{name}"  # this folder, or USER/{name} on the Hub',
        "model = AutoModelForSequenceClassification.from_pretrained(path, trust_remote_code=True)",
        f"print(model({inputs}).logits.argmax(-1))",
    ]


def _use(baseline: bool, int8: bool) -> list[str]:
    """What a language model is for, and the commands of ssm_lm on its folder."""
    talk = [] if baseline else ["`ssm-lm chat DIR` keeps its state between turns; "]
    limits = (
        "It continues texts of the kind that it has read. It was not taught to follow instructions, it states what is "
        "not so, and nothing filters what it writes."
    )
    if int8:  # which the commands do not take
        return [limits]
    return [
        limits,
        "",
        f"With ssm_lm and this folder at DIR: {''.join(talk)}`ssm-lm generate DIR --prompt TEXT` continues a text; "
        "`ssm-lm train configs/train/finetune.yaml --init_from DIR --data TEXT_DIR` goes on with texts of your own.",
    ]


def _strategies(model) -> list[str]:
    """What the class offers to generate()'s custom_generate, if it does."""
    names = sorted(getattr(model, "strategies", None) or ())
    if not names:
        return []
    return [
        f"Beside the decoding methods of `generate()` the model brings its own, {', '.join(names)}: "
        f'`model.generate(..., custom_generate=model.strategies["{names[0]}"])`.',
        "",
    ]


def _projections(model) -> list[str]:
    """What an adapter of PEFT can stand on: the matrices of the blocks."""
    layers = [module for name, module in model.named_modules() if name.split(".")[-1] == "layers"]
    linear = [name for part in layers for name, module in part.named_modules() if isinstance(module, torch.nn.Linear)]
    names = sorted({name.split(".")[-1] for name in linear})
    return [f"An adapter of PEFT stands on the blocks' projections: `target_modules={json.dumps(names)}`.", ""]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.4f}"
