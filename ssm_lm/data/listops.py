"""ListOps as in the Long Range Arena: nested lists of digits under MIN, MAX, MED and SM; the label is their value.

    [MAX 2 9 [MIN 4 7 ] 0 ]  ->  9

A node is an operator with probability 0.25 where its depth is less than 10 (the root has depth 1), else a digit. An
operator has 2 to 10 arguments. MED is the median, truncated to an integer, and SM the sum modulo 10. Kept are the
sequences of more than 500 and fewer than 2,000 tokens.

    python -m ssm_lm.data.listops --output data/listops

writes basic_train.tsv, basic_val.tsv and basic_test.tsv, the names and the columns of the published files, which
`read_split` reads too (their parentheses are dropped, as everywhere).

Sources: Nangia and Bowman (2018); Tay et al., "Long Range Arena" (2021), for the parameters.
"""

import argparse
import hashlib
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..files import new_folder

OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")
END = "]"
# a token's id is its place, from 1: 0 is padding
TOKENS = (*"0123456789", *OPERATORS, END)
VOCAB_SIZE = len(TOKENS) + 1
PAD = 0
NUM_LABELS = 10

OPERATOR_PROBABILITY = 0.25
MAX_DEPTH = 10
MAX_ARGUMENTS = 10
LONGER_THAN, SHORTER_THAN = 500, 2000

SPLITS = {
    "train": ("basic_train.tsv", 96_000),
    "validation": ("basic_val.tsv", 2_000),
    "test": ("basic_test.tsv", 2_000),
}
HEADER = "Source\tTarget"

_IDS = {token: number for number, token in enumerate(TOKENS, start=1)}


class _TooLongError(Exception):
    """The sequence has reached SHORTER_THAN tokens and will not be kept."""


def apply(operator: str, values: list[int]) -> int:
    """The value of one list."""
    if operator == "[MIN":
        return min(values)
    if operator == "[MAX":
        return max(values)
    if operator == "[SM":
        return sum(values) % 10
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) // 2


def _grow(rng: random.Random, tokens: list[str], depth: int) -> int:
    """Append a node's tokens and return its value."""
    if len(tokens) >= SHORTER_THAN:
        raise _TooLongError
    if depth >= MAX_DEPTH or rng.random() >= OPERATOR_PROBABILITY:
        digit = rng.randrange(10)
        tokens.append(str(digit))
        return digit
    operator = rng.choice(OPERATORS)
    tokens.append(operator)
    values = [_grow(rng, tokens, depth + 1) for _ in range(rng.randint(2, MAX_ARGUMENTS))]
    tokens.append(END)
    return apply(operator, values)


def examples(seed: int | str) -> Iterator[tuple[str, int]]:
    """Endless (source, value), the same for the same seed; what is too short or too long is left out."""
    rng = random.Random(str(seed))  # a string seeds alike on every version and machine
    while True:
        tokens: list[str] = []
        try:
            value = _grow(rng, tokens, depth=1)
        except _TooLongError:
            continue
        if LONGER_THAN < len(tokens) < SHORTER_THAN:
            yield " ".join(tokens), value


def write_listops(output: str | os.PathLike, seed: int = 0, counts: dict[str, int] | None = None) -> Path:
    """Write the three splits to the new folder `output` and return it. No sequence is in it twice.

    counts: examples by split, where they are not those of the Long Range Arena.
    Raises UserError for an output that holds something or cannot be written.
    """
    output = Path(output).expanduser()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output}: exists and is not an empty folder; choose another")
    seen = set()
    try:
        with new_folder(output) as partial:
            for split, (name, count) in SPLITS.items():
                count = (counts or {}).get(split, count)
                with open(partial / name, "w", encoding="utf-8", newline="\n") as file:
                    file.write(f"{HEADER}\n")
                    for source, value in examples(f"{seed} {split}"):
                        if not count:
                            break
                        digest = hashlib.blake2b(source.encode(), digest_size=16).digest()
                        if digest in seen:
                            continue
                        seen.add(digest)
                        file.write(f"{source}\t{value}\n")
                        count -= 1
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror}); choose another place") from error
    return output


def read_split(path: str | os.PathLike) -> tuple[list[np.ndarray], np.ndarray]:
    """Token ids (uint8, one array an example) and labels (int64) of a .tsv file, ours or the published one.

    Raises UserError, with the line, for anything else.
    """
    sequences, labels = [], []
    try:
        with open(path, encoding="utf-8") as file:
            if next(file, "").rstrip("\r\n") != HEADER:
                raise UserError(f"{path}: does not begin with the columns Source and Target; it is no ListOps file")
            for number, line in enumerate(file, start=2):
                source, tab, target = line.rstrip("\r\n").partition("\t")
                words = source.replace("(", " ").replace(")", " ").split()
                unknown = next((word for word in words if word not in _IDS), None)
                if not tab or not words or unknown is not None or not (len(target) == 1 and target.isdecimal()):
                    raise UserError(f"{path}, line {number}: not a list, a tab and its value")
                sequences.append(np.fromiter((_IDS[word] for word in words), np.uint8, len(words)))
                labels.append(int(target))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    return sequences, np.array(labels, np.int64)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ssm_lm.data.listops", description="Generate ListOps.")
    parser.add_argument("--output", required=True, metavar="DIR", help="the folder to write; must be new")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other sequences (default: 0)")
    args = parser.parse_args(argv)
    try:
        print(f"{write_listops(args.output, args.seed)}: {', '.join(f'{n:,} {s}' for s, (_, n) in SPLITS.items())}")
    except UserError as error:
        print(f"listops: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
