"""`ssm-lm <verb>`: the command line.

Each verb lives beside the code that it runs, in a module with two functions, `add_arguments(parser)` and `run(args)`;
this file only finds it. Modules are imported when their verb is called, so that `ssm-lm --help` does not import torch.

Exit codes: 0 done; 2 the arguments, the config or the input is wrong (one line on stderr); 75 training was asked to end
by a signal and can go on; 1 anything else.
"""

import argparse
import difflib
import gc
import importlib
import os
import re
import signal
import sys
import time

from . import __version__
from .allocator import keep_freed_memory
from .errors import UserError
from .internals.python import leave
from .noise import drop_known_lines
from .own_layers import load_layers

# verb -> (module, one line for --help)
VERBS = {
    "prepare": ("ssm_lm.data.prepare", "turn text into a memory-mapped token stream"),
    "verify": ("ssm_lm.data.verify", "read all of a prepared folder and hold it against its manifest"),
    "train": ("ssm_lm.training.train", "train a model as a config says"),
    "eval": ("ssm_lm.evaluation.evaluate", "perplexity by token, by word and by byte"),
    "generate": ("ssm_lm.evaluation.generate", "continue a prompt"),
    "chat": ("ssm_lm.serving.chat", "talk with a model at a terminal, its state kept between turns"),
    "serve": ("ssm_lm.serving.serve", "serve a model to many users, as OpenAI's clients ask for it"),
    "export": ("ssm_lm.hub.export", "write a folder that AutoModelForCausalLM loads without ssm_lm"),
    "push": ("ssm_lm.hub.push", "publish an exported folder on the Hub, private by default"),
    "convert": ("ssm_lm.hub.convert", "turn a checkpoint of state-spaces/s4 into a folder that loads here"),
    "compare": ("ssm_lm.comparison.compare", "train contenders that one file names, and put them into a table"),
    "sweep": ("ssm_lm.comparison.sweep", "train a config at every combination of values, and put them into a table"),
    "estimate": ("ssm_lm.estimate.report", "parameters, FLOPs, memory and days of a run, before it takes a GPU"),
    "runs": ("ssm_lm.runs.listing", "list the runs of a folder: how far they came, their best, what may go on"),
    "plot": ("ssm_lm.runs.curves", "draw the curves of one run or of several into one picture"),
    "bench": ("ssm_lm.bench.command", "generation, prefill, training beside other models; the fused kernels"),
    "doctor": ("ssm_lm.doctor", "say what this machine has: torch, GPU, Triton, DeepSpeed"),
    "completion": ("ssm_lm.completion", "print the script by which bash or zsh completes all this"),
}


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage block.

    verbs: the parsers of the verbs by their names, of the parser above them; verb: the one that is called.
    """

    verbs, verb = {}, None

    def error(self, message):
        called = self.verbs.get(self.verb, self)  # argparse has what stands above complain of an unknown option
        hint = ""
        if unknown := re.match(r"unrecognized arguments: (--[\w-]+)", message):
            known = sorted(set(re.findall(r"--[a-z][\w-]*", called.format_help())))
            near = difflib.get_close_matches(unknown[1], known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"{message}{hint or f'; see `{called.prog} --help`'}")


def build_parser(verb: str | None) -> argparse.ArgumentParser:
    """The parser of the whole command, with the arguments of `verb` alone filled in."""
    parser = OneLineParser(prog="ssm-lm", description="Train and run state space language models.")
    parser.add_argument("--version", action="version", version=f"ssm-lm {__version__}")
    parser.verbs, parser.verb = {}, verb
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=OneLineParser)
    for name, (module, summary) in VERBS.items():
        verb_parser = verbs.add_parser(name, help=summary, description=summary.capitalize() + ".")
        parser.verbs[name] = verb_parser
        if name == verb:
            implementation = importlib.import_module(module)
            implementation.add_arguments(verb_parser)
            verb_parser.set_defaults(run=implementation.run)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one verb and return the exit code."""
    drop_known_lines()
    argv = sys.argv[1:] if argv is None else argv
    # the deepspeed launcher puts --local_rank=N first; the environment says the same
    argv = [word for word in argv if not word.startswith("--local_rank=")]
    verb = next((word for word in argv if not word.startswith("-")), None)
    try:
        if verb is not None and verb not in VERBS:
            near = difflib.get_close_matches(verb, VERBS, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise UserError(f"there is no verb {verb!r}; {hint}`ssm-lm --help` lists them")
        args = build_parser(verb).parse_args(argv)
        load_layers()
        args.run(args)
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            wait_for_the_first_rank()
        print(f"ssm-lm: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ssm-lm: interrupted", file=sys.stderr)
        return 1
    return 0


PATIENCE = 15  # seconds
# after which Python looks for cycles among them. At its own 700 it looks a thousand times while torch and transformers
# are imported, whose objects all stay: an eighth of the start
NEW_OBJECTS = 10_000


def wait_for_the_first_rank() -> None:
    """So that a mistake is one line a machine and not one a rank: the first rank writes it and leaves, whereupon the
    launcher ends this one. One that left before would have the first ended without its line; one that is still here
    after the wait had a mistake of its own.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(PATIENCE)


def entry(argv: list[str] | None = None) -> None:
    """The command as a process: `main`, and its exit code.

    One rank of several leaves without taking the interpreter apart: threads of a collective backend that come back
    while Python is half gone abort the process, after all is done, and the launcher calls the run failed.
    """
    keep_freed_memory()
    gc.set_threshold(NEW_OBJECTS)
    try:
        code = main(argv)
    except SystemExit as leaving:
        code = leaving.code or 0
    if os.environ.get("WORLD_SIZE", "1") != "1":
        leave(code, run_exit_functions=True)
    sys.exit(code)


if __name__ == "__main__":
    entry()
