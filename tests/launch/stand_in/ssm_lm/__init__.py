"""In front of the real ssm_lm on the path: its modules, but a `python -m ssm_lm train` that starts in a second."""

from pkgutil import extend_path

__path__ = extend_path(__path__, __name__)
