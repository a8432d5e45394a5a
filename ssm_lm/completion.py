"""`ssm-lm completion bash|zsh`: a script by which the shell completes verbs, options, keys of a config and files.

    source <(ssm-lm completion bash)

The words are read from syntax trees and written into the script, so that the shell never waits for an import.
"""

import argparse
import ast
from pathlib import Path

from .config.keys import model_keys, training_keys

PACKAGE = Path(__file__).parent
SHELLS = ("bash", "zsh")
SCRIPT = """\
_ssm_lm() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} words=""
    COMPREPLY=()
    if [ "$COMP_CWORD" = 1 ]; then
        words="{verbs} --help --version"
    else
        case ${{COMP_WORDS[1]}} in
{cases}
        esac
        case $word in
            -*) ;;
            *) [ "${{COMP_WORDS[1]}}" = completion ] || words="" ;;
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
    [ -n "$words" ] || COMPREPLY=($(compgen -f -- "$word"))
}}
complete -o filenames -F _ssm_lm ssm-lm
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument("shell", choices=SHELLS, help="for your ~/.bashrc: source <(ssm-lm completion bash)")


def run(args: argparse.Namespace) -> None:
    """Print the script."""
    if args.shell == "zsh":
        print("autoload -U +X bashcompinit && bashcompinit")
    print(script(), end="")


def script() -> str:
    """The functions for bash, which zsh understands after `bashcompinit`."""
    from .cli import VERBS

    cases = {verb: " ".join(options(verb)) for verb in VERBS} | {"completion": " ".join(SHELLS)}
    lines = [f'            {verb}) words="{words}" ;;' for verb, words in cases.items()]
    return SCRIPT.format(verbs=" ".join(VERBS), cases="\n".join(lines))


def options(verb: str) -> list[str]:
    """The options of a verb; of `train`, the keys of a config too."""
    from .cli import VERBS

    found = ["--help", *declared(VERBS[verb][0])]
    if verb == "train":
        found += ["--dry-run", *(f"--{key}" for key in sorted(training_keys()))]
        found += [f"--model.{key}" for key in model_keys()]
    return found


def declared(module: str, function: str = "add_arguments") -> list[str]:
    """The options that a function of a module declares, and the functions that it calls for that."""
    tree = ast.parse(PACKAGE.joinpath(*module.split(".")[1:]).with_suffix(".py").read_text(encoding="utf-8"))
    home = {node.name: module for node in tree.body if isinstance(node, ast.FunctionDef)}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.level and node.module:
            above = module.split(".")[: -node.level]
            home |= {alias.name: ".".join([*above, node.module]) for alias in node.names}
    found = []
    body = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function)
    for node in ast.walk(body):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            names = [word.value for word in node.args if isinstance(word, ast.Constant)]
            found += [name for name in names if name.startswith("--")]
        elif isinstance(node, ast.Call) and (name := getattr(node.func, "id", "")).startswith("add_") and name in home:
            found += declared(home[name], name)
    return found
