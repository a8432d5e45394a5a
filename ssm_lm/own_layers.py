"""Layers of one's own for the commands: SSM_LM_LAYERS names the Python files that define and register them."""

import importlib.util
import os
import sys
from pathlib import Path

from .errors import UserError, one_line

VARIABLE = "SSM_LM_LAYERS"


def load_layers() -> None:
    """Run the files that SSM_LM_LAYERS names, one or several with a colon between; each registers its layers.

    Raises UserError for a file that is not there or cannot be run.
    """
    for name in filter(None, os.environ.get(VARIABLE, "").split(os.pathsep)):
        path = Path(name).expanduser()
        if not path.is_file():
            raise UserError(f"{VARIABLE}: there is no file {name}; give the Python file of a layer")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module  # so that the source of its classes is found, for an export
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # whatever code of a user's raises
            raise UserError(f"{VARIABLE}: {name} cannot be run ({type(error).__name__}: {one_line(error)})") from error
