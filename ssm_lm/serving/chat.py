"""`ssm-lm chat`: a conversation with a model at a terminal. Its state is kept, so a turn costs its own tokens only."""

import argparse
import contextlib
import signal
import sys
import time
from collections.abc import Callable

from ..errors import UserError
from ..evaluation.evaluate import add_model_arguments
from .conversation import Conversations, Reply, Words
from .engine import Engine, Finished, Request
from .sampling import Draw


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument("model", metavar="MODEL", help="a model folder, a training run's output or a Hub id")
    parser.add_argument("--system", default="", metavar="TEXT", help="what stands before the conversation")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="of a reply (default: 256)")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0: no draws (default: 0.8)")
    parser.add_argument("--top-p", type=float, default=0.95, metavar="P", help="(default: 0.95)")
    parser.add_argument("--seed", type=int, metavar="N", help="of the draws; without it they differ from run to run")
    parser.add_argument("--stats", action="store_true", help="after each reply, tokens read and written, and seconds")
    add_words(parser)
    add_model_arguments(parser)


def add_words(parser: argparse.ArgumentParser) -> None:
    """The arguments that say how a conversation is written as a text."""
    parser.add_argument("--user-prefix", default=Words.user, metavar="TEXT", help=f"(default: {Words.user})")
    parser.add_argument("--reply-prefix", default=Words.reply, metavar="TEXT", help=f"(default: {Words.reply})")


def words_of(args: argparse.Namespace) -> Words:
    """UserError for an empty one."""
    for key in ("user_prefix", "reply_prefix"):
        if not getattr(args, key).strip():
            raise UserError(f"--{key.replace('_', '-')}: is empty, so nobody could tell who speaks; give a word")
    return Words(args.user_prefix, args.reply_prefix)


def load(args: argparse.Namespace):
    """(model, tokenizer) as the arguments say; UserError where there is no such pair, or no states to keep."""
    from ..baselines import is_baseline
    from ..evaluation.evaluate import place
    from ..loading.model import load_model
    from ..loading.tokenizer import check_vocabulary_fits, load_tokenizer

    tokenizer = load_tokenizer(args.model)
    model = load_model(args.model, args.dtype)
    if is_baseline(model.config):
        raise UserError(
            f"{args.model}: is a {model.config.model_type} of transformers, whose past grows, and this verb keeps "
            "states of constant size; `transformers serve` and `transformers chat` take such a model"
        )
    check_vocabulary_fits(tokenizer, model, args.model)
    return place(model, args.device), tokenizer


def check_draw(args: argparse.Namespace) -> None:
    """UserError for values that make no sense."""
    if args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {args.max_new_tokens}: must be 1 or more")
    if not 0 <= args.temperature <= 100:  # nor a NaN
        raise UserError(f"--temperature {args.temperature}: must be from 0 to 100")
    if not 0 < args.top_p <= 1:
        raise UserError(f"--top-p {args.top_p}: must be above 0 and at most 1")


def run(args: argparse.Namespace) -> None:
    """Talk, until the end of the input."""
    words = words_of(args)
    check_draw(args)
    chat = Chat(*load(args), words, args.system)
    draw = Draw(args.temperature, args.top_p, args.seed)
    terminal = sys.stdin.isatty()
    if terminal:
        import readline  # noqa: F401  (lines that can be edited and called back)

        print("Ctrl-C cuts a reply off, an empty line begins anew, Ctrl-D ends.")
    while True:
        try:
            said = input("> " if terminal else "")
        except (EOFError, KeyboardInterrupt):
            print(end="\n" if terminal else "")
            return
        if not said.strip():
            chat.begin()
            continue
        start = time.perf_counter()
        found = chat.turn(said, args.max_new_tokens, draw, lambda piece: print(piece, end="", flush=True))
        print()
        if args.stats:
            seconds = time.perf_counter() - start
            print(f"[{found.read} tokens read, {found.written} written, {seconds:.2f} s]", file=sys.stderr, flush=True)


@contextlib.contextmanager
def on_interrupt(act: Callable[[], None]):
    """Ctrl-C within the block calls `act`, and interrupts nothing: a step is made whole."""
    before = signal.signal(signal.SIGINT, lambda *_: act())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class Chat:
    """A conversation: `messages` so far, and an engine that knows their states."""

    def __init__(self, model, tokenizer, words: Words = Words(), system: str = ""):  # noqa: B008
        self.engine = Engine(model, tokenizer, rows=1)
        self.conversations = Conversations(tokenizer, words)
        self.first = [("system", system)] if system else []
        self.begin()

    def begin(self) -> None:
        """Anew."""
        self.messages = list(self.first)

    def turn(self, said: str, max_new_tokens: int, draw: Draw, write) -> Finished:
        """Answer, by calls of `write` with parts of the reply; Ctrl-C cuts it off."""
        self.messages.append(("user", said))
        reply, ended = Reply(), []

        def receive(event):
            if isinstance(event, Finished):
                ended.append(event)
            elif piece := reply.add(event.text):
                write(piece)

        ids = self.conversations.ids(self.messages)
        request = Request(ids, max_new_tokens, draw, receive, self.conversations.words.stops)
        with on_interrupt(lambda: setattr(request, "cancelled", True)):
            self.engine.run(request)
        if ended[0].reason == "error":
            raise UserError("the model's output is no number; its training diverged, give an earlier checkpoint")
        self.messages.append(("assistant", reply.text))
        self.conversations.remember(ids, reply.text, ended[0].ids)
        return ended[0]
