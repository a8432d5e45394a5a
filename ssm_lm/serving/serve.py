"""`ssm-lm serve`: a model behind OpenAI's protocol, for as many users at once as it has rows."""

import argparse
import contextlib
import math
import os
import re
import socket
from pathlib import Path

from ..errors import UserError
from ..evaluation.evaluate import add_model_arguments
from ..extras import need
from .chat import add_words, load, words_of

TOKEN = "SSM_LM_TOKEN"  # of the environment
UNITS = {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument("model", metavar="MODEL", help="a model folder, a training run's output or a Hub id")
    parser.add_argument("--host", default="127.0.0.1", help="another than this machine alone needs a token (127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="0: any that is free (8000)")
    parser.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help=f"holds the token that clients give as their API key; or the variable {TOKEN} does",
    )
    parser.add_argument("--name", help="of the model, for clients (default: that of its folder)")
    parser.add_argument("--max-rows", type=int, default=32, metavar="N", help="texts written at once (32)")
    parser.add_argument("--max-queue", type=int, default=256, metavar="N", help="further ones that may wait (256)")
    parser.add_argument("--max-prompt-tokens", type=int, default=16384, metavar="N", help="of a request (16384)")
    parser.add_argument("--max-new-tokens", type=int, default=1024, metavar="N", help="of an answer (1024)")
    parser.add_argument(
        "--timeout", type=float, default=120.0, metavar="S", help="seconds until an answer is cut short (120)"
    )
    parser.add_argument(
        "--state-memory",
        default="1GiB",
        metavar="SIZE",
        help="for the states of conversations that may go on (1GiB)",
    )
    add_words(parser)
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Serve until a signal."""
    need("serve", "serve", "starlette", "uvicorn")
    for key in ("max_rows", "max_queue", "max_prompt_tokens", "max_new_tokens"):
        if getattr(args, key) < 1:
            raise UserError(f"--{key.replace('_', '-')} {getattr(args, key)}: must be 1 or more")
    if not 0 < args.timeout < math.inf:
        raise UserError(f"--timeout {args.timeout}: must be a number of seconds above 0")
    if not 0 <= args.port <= 65535:
        raise UserError(f"--port {args.port}: must be from 0 to 65535")
    words, size, token = words_of(args), parse_size(args.state_memory), read_token(args.token_file)

    import uvicorn

    from .engine import Engine
    from .protocol import Limits
    from .server import LOOPBACK, Service

    loopback = args.host in LOOPBACK
    if not loopback and token is None:
        raise UserError(
            f"--host {args.host}: other machines could use the model; give a token, by --token-file or {TOKEN}"
        )
    model, tokenizer = load(args)
    engine = Engine(model, tokenizer, args.max_rows, args.max_queue, size)
    name = args.name or Path(args.model).expanduser().resolve().name
    limits = Limits(args.max_prompt_tokens, args.max_new_tokens, args.timeout)
    service = Service(engine, tokenizer, name, words, limits, token)
    listening = listen(args.host, args.port)
    config = uvicorn.Config(
        service.app(LOOPBACK if loopback else ("*",)),
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=10,
    )
    host, port = listening.getsockname()[:2]
    print(f"{name}: http://{f'[{host}]' if ':' in host else host}:{port}/v1; Ctrl-C ends it", flush=True)
    with contextlib.suppress(KeyboardInterrupt):  # after an orderly end
        uvicorn.Server(config).run(sockets=[listening])


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections; UserError where there can be none."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host.strip("[]"), port), family=family, backlog=2048)
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: {error.strerror or error}; choose another port") from error


def parse_size(text: str) -> int:
    """`512MiB` -> bytes; UserError for what is no size."""
    found = re.fullmatch(r"(\d+)(KIB|MIB|GIB)", text.upper())
    if not found:
        raise UserError(f"--state-memory {text}: give a size such as 512MiB or 2GiB")
    return int(found[1]) * UNITS[found[2]]


def read_token(file: Path | None) -> str | None:
    """The token, from the file or the environment, or None. UserError for one that cannot be read or is empty."""
    if file is None:
        return os.environ.get(TOKEN) or None
    try:
        token = file.expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--token-file {file}: cannot be read ({error})") from error
    if not token:
        raise UserError(f"--token-file {file}: is empty; write the token into it")
    return token
