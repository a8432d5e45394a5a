"""Decoding with drafts: the tokens of greedy search in fewer forwards of the model. Seconds on one core.

    python examples/drafts.py exports/quickstart --prompt "Return a new array"

A draft guesses some tokens; one forward of the model checks all of them and keeps those that greedy search would have
chosen. A state space is then brought back to where the last right token left it, which its cache records.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast


def main(argv: list[str] | None = None) -> dict[str, tuple[list[int], int]]:
    """Generate in three ways; returns {way: (the new tokens, forwards of the model)}."""
    parser = argparse.ArgumentParser(description="Compare greedy search with two kinds of drafts.")
    parser.add_argument("model")
    parser.add_argument("--prompt", default="Return a new array")
    parser.add_argument("--tokens", type=int, default=60)
    args = parser.parse_args(argv)

    model = AutoModelForCausalLM.from_pretrained(args.model, trust_remote_code=True).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.model)
    prompt = tokenizer(args.prompt, return_tensors="pt")
    ways = {
        "greedy": {},
        "n-grams of the text": {"prompt_lookup_num_tokens": 8},  # a draft is what followed the same words before
        "token recycling": {"custom_generate": model.strategies["token-recycling"]},  # from the model's earlier logits
    }
    found = {}
    forwards = 0

    def count(*_):
        nonlocal forwards
        forwards += 1

    handle = model.register_forward_pre_hook(count)
    for name, options in ways.items():
        forwards = 0
        sequence = model.generate(**prompt, max_new_tokens=args.tokens, do_sample=False, eos_token_id=None, **options)
        found[name] = sequence[0, prompt["input_ids"].shape[1] :].tolist(), forwards
        print(f"{name:20} {len(found[name][0])} tokens in {forwards} forwards")
    handle.remove()
    assert all(tokens == found["greedy"][0] for tokens, _ in found.values()), "a draft changes no token"
    print(tokenizer.decode(torch.cat([prompt["input_ids"][0], torch.tensor(found["greedy"][0])])))
    return found


if __name__ == "__main__":
    main()
