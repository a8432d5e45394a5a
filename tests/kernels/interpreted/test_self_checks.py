"""The self-checks that the shipped models ask for in training on a GPU, interpreted: where one fails there, its kernel
does not run, and the model is as slow as without it.
"""

from functools import partial
from pathlib import Path

import pytest
import torch

from ssm_lm import S4Config
from ssm_lm.config.reading import read_yaml
from ssm_lm.estimate.memory import count_pieces
from ssm_lm.modeling import kernels_s4
from ssm_lm.modeling.kernels_s4 import OPERATIONS, self_check

CONFIGS = Path(__file__).parents[3] / "configs" / "model"
VOCABULARY = 5000  # where the config has none


@pytest.fixture(scope="module")
def asked():
    """(operation, problem) of every kernel that a step of a shipped model runs under autocast, on Ampere and Hopper."""
    found, decide = set(), kernels_s4._decide

    def note(operation, device, unsupported, setting, problem=()):
        runs = decide(operation, device, unsupported, setting, problem)
        if runs:
            found.add((operation, problem))
        return runs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels_s4, "_decide", note)
        for file in sorted(CONFIGS.glob("*.yaml")):
            config = S4Config(**({"vocab_size": VOCABULARY} | read_yaml(file)))
            for architecture in ("sm_80", "sm_90"):
                count_pieces(config, 2, 512, autocast=torch.bfloat16, architecture=architecture)
    return sorted(found, key=str)


@pytest.mark.slow
@pytest.mark.parametrize("one", [True, False], ids=["of the scan of ssd", "of all others"])
def test_by_a_margin(asked, one):
    """A card rounds otherwise than the interpreter: half the tolerance is left to it."""
    checked = [(operation, problem) for operation, problem in asked if (operation == "ssd_scan") == one]
    assert len(checked) >= (2 if one else 30)
    for operation, problem in checked:
        cases = partial(OPERATIONS[operation].load()[1], torch.device("cpu"), *problem)
        cause, worst = self_check(lambda _, cases=cases: cases(), torch.device("cpu"))
        assert cause is None, (operation, problem, cause)
        assert worst < 0.5, (operation, problem)
