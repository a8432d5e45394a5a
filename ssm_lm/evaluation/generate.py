"""`ssm-lm generate`: continue a prompt. stdout has the text, prompt and continuation, and nothing else."""

import argparse
import math
from pathlib import Path

import torch
from transformers import GenerationConfig, TextStreamer

from ..baselines import is_baseline
from ..errors import UserError
from ..loading.model import load_model
from ..loading.tokenizer import check_vocabulary_fits, has_tokenizer, load_tokenizer
from .evaluate import add_model_arguments, place

# how the next token is found -> the arguments that belong to it
STRATEGIES = {
    "greedy": (),
    "sample": ("temperature", "top_k", "top_p"),
    "beam": ("temperature", "top_k", "top_p"),
    "diverse-beam": ("num_beam_groups", "diversity_penalty"),
    "contrastive": ("penalty_alpha", "top_k"),
    "prompt-lookup": ("num_draft_tokens", "temperature", "top_k", "top_p"),
    "token-recycling": ("num_draft_tokens",),
    "assisted": ("draft", "num_draft_tokens", "temperature", "top_k", "top_p"),
}
OPTIONS = sorted({option for options in STRATEGIES.values() for option in options})
OF_THE_MODEL = ("diverse-beam", "contrastive", "token-recycling")  # the rest is in generate() of transformers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument("model", metavar="MODEL", help="a model folder, a training run's output or a Hub id")
    parser.add_argument("--prompt", metavar="TEXT", help="the text to continue; empty: begin a text")
    parser.add_argument("--prompt-file", type=Path, metavar="FILE", help="a UTF-8 file that holds it")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="(default: 64)")
    parser.add_argument("--greedy", action="store_true", help="the most likely token each time; else tokens are drawn")
    parser.add_argument("--temperature", type=float, metavar="T", help="sharper below 1, flatter above (default: 1)")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K most likely tokens (default: all)")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw from the likely tokens of mass P (default: 1)")
    parser.add_argument("--num-beams", type=int, default=1, metavar="N", help="beam search with N beams (default: 1)")
    parser.add_argument(
        "--strategy",
        choices=STRATEGIES,
        help="how tokens are found (default: drawn, or as --greedy and --num-beams say). contrastive shuns repetition; "
        "prompt-lookup, token-recycling and assisted verify drafts: the greedy text in less time",
    )
    parser.add_argument(
        "--num-beam-groups", type=int, metavar="N", help="of diverse-beam; divides --num-beams (default: as many)"
    )
    parser.add_argument("--diversity-penalty", type=float, metavar="X", help="of diverse-beam (default: 1)")
    parser.add_argument(
        "--penalty-alpha", type=float, metavar="A", help="of contrastive, 0 to 1, beside --top-k 4 (default: 0.6)"
    )
    parser.add_argument("--draft", metavar="MODEL", help="of assisted: a smaller model with the same vocabulary")
    parser.add_argument(
        "--num-draft-tokens", type=int, metavar="N", help="of the strategies that draft (default: theirs)"
    )
    parser.add_argument("--num-return-sequences", type=int, default=1, metavar="N", help="how many texts (default: 1)")
    parser.add_argument("--ignore-eos", action="store_true", help="go on where the model ends the text")
    parser.add_argument("--seed", type=int, metavar="N", help="of the draws; without it they differ from run to run")
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Print what the model makes of the prompt: as it comes, or text after text where there are several."""
    settings = generation_settings(args)
    prompt = read_prompt(args)
    tokenizer = load_tokenizer(args.model)
    model = load_model(args.model, args.dtype)
    check_vocabulary_fits(tokenizer, model, args.model)
    model = place(model, args.device)
    own = strategy_arguments(args, model, tokenizer)
    generate(model, tokenizer, prompt, settings, args.seed, args.ignore_eos, own)


def read_prompt(args: argparse.Namespace) -> str:
    """The prompt from --prompt or --prompt-file; UserError for both, none, or a file that cannot be read."""
    if (args.prompt is None) == (args.prompt_file is None):
        what = "both are given" if args.prompt is not None else "neither is given"
        raise UserError(f"--prompt, --prompt-file: {what}; give one of them")
    if args.prompt is not None:
        return args.prompt
    try:
        return args.prompt_file.expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--prompt-file {args.prompt_file}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"--prompt-file {args.prompt_file}: not UTF-8 at byte {error.start}; convert it first"
        ) from error


def generation_settings(args: argparse.Namespace) -> dict:
    """The arguments as a GenerationConfig takes them; UserError for values or combinations that make no sense."""
    for name in ("max_new_tokens", "num_beams", "num_return_sequences", "top_k", "num_beam_groups", "num_draft_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"{_flag(name)} {value}: must be 1 or more")
    if args.temperature is not None and not 0 < args.temperature < math.inf:  # nor a NaN
        raise UserError(f"--temperature {args.temperature}: must be above 0; --greedy is the limit at 0")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise UserError(f"--top-p {args.top_p}: must be above 0 and at most 1")
    if args.penalty_alpha is not None and not 0 <= args.penalty_alpha <= 1:
        raise UserError(f"--penalty-alpha {args.penalty_alpha}: must be from 0 to 1")
    if args.diversity_penalty is not None and not args.diversity_penalty > 0:
        raise UserError(f"--diversity-penalty {args.diversity_penalty}: must be above 0")
    _check_strategy(args)
    drawn = [name for name in ("temperature", "top_k", "top_p") if getattr(args, name) is not None]
    if args.strategy == "contrastive":
        drawn = []  # its top_k are candidates
    greedy = args.greedy or args.strategy == "greedy"
    if greedy and drawn:
        flag = "--greedy" if args.greedy else "--strategy greedy"
        raise UserError(f"{flag}: draws nothing, so {_flag(drawn[0])} has no meaning; leave one out")
    settings = {
        "max_new_tokens": args.max_new_tokens,
        "num_beams": args.num_beams,
        "num_return_sequences": args.num_return_sequences,
        # one token after the other is drawn; the other ways to find them draw where they are told how
        "do_sample": not greedy and ((args.num_beams == 1 and args.strategy in (None, "sample")) or bool(drawn)),
    }
    if args.strategy == "prompt-lookup":
        settings["prompt_lookup_num_tokens"] = args.num_draft_tokens or 10
    if settings["do_sample"]:
        settings |= {"temperature": args.temperature or 1.0, "top_k": args.top_k or 0, "top_p": args.top_p or 1.0}
    elif args.num_return_sequences > args.num_beams:
        raise UserError(
            f"--num-return-sequences {args.num_return_sequences}: only {args.num_beams} differ without a draw; "
            "raise --num-beams, or leave --greedy out"
        )
    return settings


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _check_strategy(args: argparse.Namespace) -> None:
    """UserError for arguments that do not go with the strategy, and for one that the strategy lacks."""
    strategy = args.strategy
    # without a strategy, tokens are drawn, or beams are searched
    known = STRATEGIES["sample"] if strategy is None else STRATEGIES[strategy]
    for option in OPTIONS:
        if getattr(args, option) is not None and option not in known:
            of = [name for name, options in STRATEGIES.items() if option in options]
            given = "no --strategy" if strategy is None else f"--strategy {strategy}"
            if strategy == "greedy" and option in STRATEGIES["sample"]:
                continue  # has a message of its own
            raise UserError(f"{_flag(option)}: has no meaning with {given}; it belongs to {', '.join(of)}")
    if strategy in ("beam", "diverse-beam"):
        if args.num_beams < 2:
            raise UserError(f"--strategy {strategy}: needs --num-beams 2 or more")
    elif strategy is not None:
        if args.num_beams > 1:
            raise UserError(f"--num-beams {args.num_beams}: has no meaning with --strategy {strategy}; leave one out")
        if args.num_return_sequences > 1 and strategy != "sample":
            number = args.num_return_sequences
            raise UserError(f"--num-return-sequences {number}: --strategy {strategy} makes one text; leave one out")
    if strategy == "sample" and args.greedy:
        raise UserError("--greedy: draws nothing, so --strategy sample has no meaning; leave one out")
    if strategy == "diverse-beam" and args.num_beams % (args.num_beam_groups or 1):
        raise UserError(f"--num-beam-groups {args.num_beam_groups}: does not divide --num-beams {args.num_beams}")
    if strategy == "assisted" and args.draft is None:
        raise UserError("--strategy assisted: needs --draft, a smaller model with the same vocabulary")


def strategy_arguments(args: argparse.Namespace, model, tokenizer) -> dict:
    """What generate() takes for the strategy beside its configuration; UserError for a draft model that cannot help."""
    if args.strategy in OF_THE_MODEL:
        if is_baseline(model.config):
            raise UserError(f"--strategy {args.strategy}: is brought by models of this package; {args.model} is none")
        own = {name: getattr(args, name) for name in STRATEGIES[args.strategy] if getattr(args, name) is not None}
        if "num_draft_tokens" in own:
            own["max_draft_length"] = own.pop("num_draft_tokens")
        if own.get("top_k", 1) > model.config.vocab_size:
            raise UserError(f"--top-k {args.top_k}: the vocabulary has {model.config.vocab_size} tokens; choose fewer")
        return {"custom_generate": model.strategies[args.strategy], **own}
    if args.strategy != "assisted":
        return {}
    draft = load_model(args.draft, args.dtype)
    same = draft.config.vocab_size == model.config.vocab_size
    if same and has_tokenizer(args.draft):
        same = load_tokenizer(args.draft).get_vocab() == tokenizer.get_vocab()
    if not same:
        raise UserError(
            f"--draft {args.draft}: has another vocabulary than {args.model}; choose a model that shares it"
        )
    if args.num_draft_tokens is not None:
        draft.generation_config.num_assistant_tokens = args.num_draft_tokens
    return {"assistant_model": place(draft, args.device)}


def generate(
    model,
    tokenizer,
    prompt: str,
    settings: dict,
    seed: int | None = None,
    ignore_eos: bool = False,
    own: dict | None = None,
) -> None:
    """Print the text, prompt and continuation; one text as its tokens come, several parted by an empty line.

    settings: from `generation_settings`; own: from `strategy_arguments`. An empty prompt begins with the
    token that begins a text. Neither it nor the token at which the model ends the text is printed.
    """
    if seed is not None:
        torch.manual_seed(seed)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    unprinted = 0 if ids else 1
    ids = ids or [first_token(model, tokenizer)]
    if ignore_eos:
        model.generation_config.eos_token_id = None  # it stands in for what a call leaves out
    ends = _as_list(model.generation_config.eos_token_id)
    # pad_token_id fills up the shorter of several texts
    config = GenerationConfig(**settings, eos_token_id=ends or None, pad_token_id=ends[0] if ends else 0)
    one = settings["num_beams"] == settings["num_return_sequences"] == 1
    inputs = torch.tensor([ids], device=model.device)
    with torch.inference_mode():
        sequences = model.generate(
            inputs,
            # given, for generate() would take a token of the prompt that is the pad token for padding
            attention_mask=torch.ones_like(inputs),
            generation_config=config,
            streamer=_Printer(tokenizer, ends, unprinted) if one else None,
            **(own or {}),
        )
    if one:
        return
    for number, sequence in enumerate(sequences.tolist()):
        end = next((i for i in range(len(ids), len(sequence)) if sequence[i] in ends), len(sequence))
        print("\n" * (number > 0) + tokenizer.decode(sequence[unprinted:end]))


def first_token(model, tokenizer) -> int:
    """The token that stands before a text: bos, else eos, which ends the text before it. UserError without either."""
    candidates = (tokenizer.bos_token_id, model.config.bos_token_id, tokenizer.eos_token_id)
    found = next((token for token in candidates if token is not None and token < model.config.vocab_size), None)
    if found is None:
        raise UserError("--prompt: is empty, and the model has no bos token to begin with; give some text")
    return found


class _Printer(TextStreamer):
    """Prints a text word by word, without the first `unprinted` tokens and the one that ends it."""

    def __init__(self, tokenizer, ends: list[int], unprinted: int):
        super().__init__(tokenizer)
        self.ends, self.unprinted, self.at_prompt = ends, unprinted, True

    def put(self, value):
        ids = value.flatten()
        if self.at_prompt:
            ids, self.at_prompt = ids[self.unprinted :], False
        else:  # one token, or as many of a draft as were right
            ids = ids[: next((i for i, token in enumerate(ids.tolist()) if token in self.ends), len(ids))]
        if len(ids):
            super().put(ids)


def _as_list(value: int | list[int] | None) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else list(value)
