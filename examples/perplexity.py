"""Perplexity of an export on a text file, with nothing of ssm_lm: the state goes on from chunk to chunk.

    python examples/perplexity.py exports/quickstart README.md

The text is one document, predicted from the end-of-text token on, and up to it. `ssm-lm eval MODEL --data DIR` finds
the same for DIR/test.txt, and more measures beside it.
"""

import argparse
import math
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast


@torch.no_grad()
def main(argv=None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a folder of `ssm-lm export`, or a repository of the Hub")
    parser.add_argument("text", type=Path)
    parser.add_argument("--chunk", type=int, default=2048, help="tokens in a forward; the result does not depend on it")
    args = parser.parse_args(argv)

    model = AutoModelForCausalLM.from_pretrained(args.model, trust_remote_code=True).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.model)
    text = args.text.read_text(encoding="utf-8")
    end = model.config.eos_token_id
    ids = torch.tensor([end, *tokenizer(text)["input_ids"], end])

    nll, cache = 0.0, None
    for chunk, following in zip(ids[:-1].split(args.chunk), ids[1:].split(args.chunk), strict=True):
        output = model(chunk[None], past_key_values=cache, use_cache=True)
        cache = output.past_key_values  # the states, of constant size
        nll += torch.nn.functional.cross_entropy(output.logits[0].float(), following, reduction="sum").item()
    words, size = len(text.split()), len(text.encode())
    found = {
        "token perplexity": math.exp(nll / (len(ids) - 1)),
        "word perplexity": math.exp(nll / words),
        "bits per byte": nll / size / math.log(2),
    }
    for name, value in found.items():
        print(f"{name:18}{value:,.4f}")
    return found


if __name__ == "__main__":
    main()
