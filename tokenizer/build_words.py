"""Build a word-level vocabulary: python tokenizer/build_words.py --dataset wikitext-103 --level word --output DIR"""

import argparse
import sys
from pathlib import Path

from ssm_lm.data.corpora import LEVELS, load_corpus
from ssm_lm.data.tokenizer import save_new
from ssm_lm.data.words import train_words
from ssm_lm.errors import UserError


def main(argv: list[str] | None = None) -> int:
    """Count the words of the train split and save; the exit code is 2 for bad input, with one line on stderr."""
    parser = argparse.ArgumentParser(description="Build the vocabulary of all words of a corpus's train split.")
    parser.add_argument("--dataset", required=True, help="wikitext-2, wikitext-103, builtin, or a file or folder")
    parser.add_argument("--vocab-size", type=int, help="keep the most frequent words alone (default: all)")
    parser.add_argument("--output", required=True, type=Path, help="the folder to write; must be new")
    parser.add_argument("--level", choices=LEVELS, help="WikiText only: raw (default) or word")
    parser.add_argument("--text-field", default="text", help="the field of JSON lines and Parquet")
    args = parser.parse_args(argv)
    try:
        corpus = load_corpus(args.dataset, level=args.level, text_field=args.text_field)
        tokenizer = train_words(corpus["train"], args.vocab_size)
        save_new(tokenizer, args.output)
    except UserError as error:
        print(f"build_words: {error}", file=sys.stderr)
        return 2
    print(f"{args.output}: {len(tokenizer):,} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
