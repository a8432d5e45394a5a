"""`ssm-lm push`: an exported folder as a model repository of the Hub, private unless --public is given.

All files arrive in one commit, so that nobody sees half a model. The large ones go first, addressed by their content:
a push that was interrupted and is given again does not send what the Hub has, file by file over LFS, chunk by chunk
where hf_xet is installed (huggingface_hub's default; HF_HUB_DISABLE_XET=1 turns it off). The token is the one of
`hf auth login` or HF_TOKEN; an argument would show it in the shell's history and in the list of processes.
"""

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError, one_line
from ..loading.folder import INDEX
from .contents import TENSORS, publishable

LOGIN = "log in with `hf auth login`, or set HF_TOKEN, with a token that may write"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument("model", metavar="MODEL", type=Path, help="a folder that `ssm-lm export` wrote")
    parser.add_argument("--repo", required=True, metavar="USER/NAME", help="the repository; made if it is not there")
    visibility = parser.add_mutually_exclusive_group()
    visibility.add_argument("--private", action="store_true", help="for those with access alone (the default)")
    visibility.add_argument("--public", action="store_true", help="for everyone")
    parser.add_argument("--revision", metavar="BRANCH", help="made if it is not there (default: main)")
    parser.add_argument("--message", metavar="TEXT", help="of the commit (default: Upload NAME with ssm_lm)")


def run(args: argparse.Namespace) -> None:
    """Push as the arguments say."""
    url, left = push(args.model, args.repo, public=args.public, revision=args.revision, message=args.message)
    if left:
        print(f"left behind, for they are no part of an export: {', '.join(left)}")
    print(f"{url}: done")


def push(
    folder, repo: str, *, public: bool = False, revision: str | None = None, message: str | None = None
) -> tuple[str, list[str]]:
    """Publish the exported model in `folder`; (URL of the commit, names of the files that were not sent).

    repo: "user/name", which is made, private unless `public`, if it is not there. revision: a branch, likewise.
    message: of the commit.
    Raises UserError for a folder that `contents.publishable` refuses, a bad name, no token, a repository whose
    visibility is another one, and whatever the Hub answers.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
    from huggingface_hub.utils import validate_repo_id

    from .. import __version__

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"--repo {repo}: {one_line(error)}") from error
    if repo.count("/") != 1:
        raise UserError(f"--repo {repo}: give it as USER/NAME")
    folder = Path(folder).expanduser()
    files, left = publishable(folder)
    token = get_token()
    if token is None:
        raise UserError(f"no token for the Hub; {LOGIN}")
    if not re.fullmatch(r"[!-~]+", token):  # no header can hold it, and the complaints of the libraries quote it
        raise UserError(f"the token for the Hub holds characters that no token has; {LOGIN}")

    api = HfApi(token=token, library_name="ssm_lm", library_version=__version__)
    with _one_line_errors(api.endpoint, repo, token), _quiet():
        try:
            is_private = api.repo_info(repo).private
        except RepositoryNotFoundError:
            api.create_repo(repo, private=not public)
            is_private = not public
        if is_private == public:
            change = "make it public in its settings" if public else "say --public to push there"
            raise UserError(f"--repo {repo}: exists and is {'private' if is_private else 'public'}; {change}")
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        there = {entry.rfilename for entry in api.repo_info(repo, revision=revision).siblings or ()}
        # weights of an earlier push that are cut into files in another way would be loaded instead of these
        stale = {name for name in there if TENSORS.fullmatch(name) or name == INDEX} - {file.name for file in files}
        commit = api.create_commit(
            repo,
            [
                *(CommitOperationAdd(file.name, file) for file in files),
                *(CommitOperationDelete(name) for name in sorted(stale)),
            ],
            commit_message=message or f"Upload {folder.resolve().name} with ssm_lm",
            revision=revision,
        )
    return commit.commit_url, left


@contextlib.contextmanager
def _one_line_errors(endpoint: str, repo: str, token: str) -> Iterator[None]:
    """Turn what huggingface_hub and the network raise into a UserError, without the token in it."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    meanings = {
        401: f"the Hub does not know the token; {LOGIN}",
        403: f"the token may not write there; {LOGIN}, and check the name",
        404: "no such repository or revision, or the token may not see it; check the names",
        409: "something else changed the repository meanwhile; push again",
        413: "the Hub takes no more in this repository; its page says how much",
    }
    again = "push again: what has arrived is not sent a second time"
    try:
        yield
    except UserError:
        raise
    except OfflineModeIsEnabled as error:
        raise UserError("HF_HUB_OFFLINE is set; unset it to push") from error
    except Exception as error:  # of the client, of the network under it, of a hook in between
        answered = error
        while not isinstance(answered, HfHubHTTPError) and answered.__cause__ is not None:
            answered = answered.__cause__  # an upload's error is wrapped
        status = answered.response.status_code if isinstance(answered, HfHubHTTPError) else None
        said = one_line(getattr(answered, "server_message", None) or answered).replace(token, "***")
        what = meanings.get(status) or (f"{said}; {again}" if status is None or status >= 500 else said)
        line = f"{endpoint}/{repo}: {f'HTTP {status}: ' if status else ''}{what}"
        # the cause may hold the request with its headers
        raise UserError(line) from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars where nobody looks, and one line about a failure, not one for every attempt."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

    bars = sys.stderr.isatty() or are_progress_bars_disabled()
    verbosity = logging.get_verbosity()
    if not bars:
        disable_progress_bars()
    if not {"HF_DEBUG", "HF_HUB_VERBOSITY"} & os.environ.keys():
        logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if not bars:
            enable_progress_bars()
