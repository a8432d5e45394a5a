"""`python -m ssm_lm VERB`: the same as `ssm-lm VERB`, for launchers that want a module (torchrun, deepspeed)."""

from .cli import entry

entry()
