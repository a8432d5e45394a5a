"""Train a byte-level BPE tokenizer: python tokenizer/train_bpe.py --dataset X --vocab-size N --output DIR"""

import argparse
import sys
from pathlib import Path

from ssm_lm.data.bpe import train_bpe
from ssm_lm.data.corpora import LEVELS, load_corpus
from ssm_lm.data.text_files import DOCUMENTS
from ssm_lm.data.tokenizer import save_new
from ssm_lm.errors import UserError


def main(argv: list[str] | None = None) -> int:
    """Train on the train split and save; the exit code is 2 for bad input, with one line on stderr."""
    parser = argparse.ArgumentParser(description="Train a byte-level BPE tokenizer on a corpus's train split.")
    parser.add_argument("--dataset", required=True, help="wikitext-2, wikitext-103, builtin, or a file or folder")
    parser.add_argument("--vocab-size", required=True, type=int, help="tokens in all, the 256 bytes included")
    parser.add_argument("--output", required=True, type=Path, help="the folder to write; must be new")
    parser.add_argument("--level", choices=LEVELS, help="WikiText only: raw (default) or word")
    parser.add_argument("--documents", choices=DOCUMENTS, default="auto", help="where a document of a text file begins")
    parser.add_argument("--text-field", default="text", help="the field of JSON lines and Parquet")
    args = parser.parse_args(argv)
    try:
        corpus = load_corpus(args.dataset, level=args.level, documents=args.documents, text_field=args.text_field)
        tokenizer = train_bpe(corpus["train"], args.vocab_size, show_progress=sys.stderr.isatty())
        save_new(tokenizer, args.output)
    except UserError as error:
        print(f"train_bpe: {error}", file=sys.stderr)
        return 2
    print(f"{args.output}: {len(tokenizer):,} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
