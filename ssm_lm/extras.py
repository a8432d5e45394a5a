"""The extras of pyproject.toml: packages that some verbs need, and the layers, the models and `generate` do without."""

import importlib.util

from .errors import UserError


def need(what: str, extra: str, *modules: str) -> None:
    """Raise UserError, with the one command that helps, where a module of an extra is not installed.

    what: the verb, the option or the file that needs it. modules: as they are imported.
    """
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(f"{what} needs {', '.join(missing)}: pip install 'ssm_lm[{extra}]'")
