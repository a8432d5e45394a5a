"""`ssm-lm generate`: continue a prompt. stdout has the text, prompt and continuation, and nothing else."""

import argparse
from pathlib import Path

import torch
from transformers import GenerationConfig, TextStreamer

from ..errors import UserError
from ..hub.load import check_vocabulary_fits, load_model, load_tokenizer
from .run import add_model_arguments, place


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
    generate(model, tokenizer, prompt, settings, args.seed, args.ignore_eos)


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
    """The arguments as generate() takes them; UserError for values or combinations that make no sense."""
    for name in ("max_new_tokens", "num_beams", "num_return_sequences", "top_k"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be 1 or more")
    if args.temperature is not None and args.temperature <= 0:
        raise UserError(f"--temperature {args.temperature}: must be above 0; --greedy is the limit at 0")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise UserError(f"--top-p {args.top_p}: must be above 0 and at most 1")
    drawn = [name for name in ("temperature", "top_k", "top_p") if getattr(args, name) is not None]
    if args.greedy and drawn:
        raise UserError(f"--greedy: draws nothing, so --{drawn[0].replace('_', '-')} has no meaning; leave one out")
    settings = {
        "max_new_tokens": args.max_new_tokens,
        "num_beams": args.num_beams,
        "num_return_sequences": args.num_return_sequences,
        "do_sample": not args.greedy and (args.num_beams == 1 or bool(drawn)),
    }
    if settings["do_sample"]:
        settings |= {"temperature": args.temperature or 1.0, "top_k": args.top_k or 0, "top_p": args.top_p or 1.0}
    elif args.num_return_sequences > args.num_beams:
        raise UserError(
            f"--num-return-sequences {args.num_return_sequences}: only {args.num_beams} differ without a draw; "
            "raise --num-beams, or leave --greedy out"
        )
    return settings


def generate(model, tokenizer, prompt: str, settings: dict, seed: int | None = None, ignore_eos: bool = False) -> None:
    """Print the text, prompt and continuation; one text as its tokens come, several parted by an empty line.

    settings: from `generation_settings`. An empty prompt begins with the token that begins a text. Neither it nor the
    token at which the model ends the text is printed.
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
        elif ids.item() in self.ends:
            return
        if len(ids):
            super().put(ids)


def _as_list(value: int | list[int] | None) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else list(value)
