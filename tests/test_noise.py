"""A verb writes what it has to say to the terminal, and no library adds a line of its own."""

import importlib.metadata
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from ssm_lm.noise import drop_known_lines

REPO = Path(__file__).parents[1]

# the quickstart's verbs, in one process
VERBS = """
import sys
hidden = sys.argv[1:]
sys.modules |= dict.fromkeys(hidden)  # an import of these fails, and importlib.util.find_spec finds nothing
from ssm_lm.cli import main

assert main(["prepare", "--dataset", "text", "--tokenizer", "bpe:300", "--output", "data"]) == 0
assert main(["train", "run.yaml"]) == 0
assert main(["eval", "run", "--data", "data", "--split", "validation"]) == 0
assert main(["generate", "run", "--prompt", "the cat", "--max-new-tokens", "3"]) == 0
assert main(["export", "run", "--output", "exported"]) == 0
extras = {"torchao", "peft", "pytest", "matplotlib", "sklearn", "lm_eval", "triton", "hypothesis"} & set(hidden)
imported = extras & {name.partition(".")[0] for name, module in list(sys.modules.items()) if module}
assert not imported, imported
print("torchao imported:", sys.modules.get("torchao") is not None)
"""
CONFIG = """
model: {hidden_size: 16, num_hidden_layers: 1, state_size: 8}
data: data
output_dir: run
deepspeed: %s/configs/deepspeed/zero2.json
sequence_length: 32
max_steps: 2
learning_rate: 1.0e-3
disable_tqdm: true
seed: 1
"""


def needed(*extras: str) -> set[str]:
    """The distributions that `pip install ssm_lm` brings, with these extras of it."""
    found, waiting = set(), ["ssm_lm"]
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        found.add(name)
        for requirement in map(Requirement, importlib.metadata.requires(name) or []):
            wanted = ("", *extras) if name == "ssm-lm" else ("",)
            if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in wanted):
                waiting.append(requirement.name)
    return found


def not_brought_by(*extras: str) -> list[str]:
    """The modules that are installed here and that `pip install ssm_lm` with these extras does not bring."""
    keep = needed(*extras) | {"pip", "setuptools"}
    modules = importlib.metadata.packages_distributions()
    return sorted(
        module
        for module, distributions in modules.items()
        if module.isidentifier() and not {re.sub(r"[-_.]+", "-", name).lower() for name in distributions} & keep
    )


@pytest.mark.slow
@pytest.mark.parametrize("extras", ["all extras", "train alone"])
def test_the_verbs_write_nothing_to_stderr(extras, tmp_path):
    """With one extra they also show that its declared dependencies are enough."""
    hidden = not_brought_by("train") if extras == "train alone" else []
    if hidden:
        assert {"torchao", "peft", "pytest", "matplotlib", "sklearn"} <= set(hidden)
    (tmp_path / "text").mkdir()
    for split in ("train", "valid", "test"):
        (tmp_path / "text" / f"{split}.txt").write_text("the cat sees the moon .\n" * 200)
    (tmp_path / "run.yaml").write_text(CONFIG % REPO)
    # a newcomer's environment, and not what other tests have left in this process's
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    environment |= {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", VERBS, *hidden],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert f"torchao imported: {not hidden}" in done.stdout  # else there is nothing to be heard of it


@pytest.mark.parametrize("logger", ["torchao", "torch.utils._pytree", "DeepSpeed"])
def test_other_lines_arrive(logger):
    heard = []

    class Listener(logging.Handler):
        def emit(self, record):
            heard.append(record.getMessage())

    listener = Listener()
    drop_known_lines()
    drop_known_lines()  # as a second verb of the same process does
    logging.getLogger(logger).addHandler(listener)
    try:
        known = {
            "torchao": "Failed to load /x/_C.abi3.so: no such library",
            "torch.utils._pytree": "<enum 'E'> is an Enum subclass and is now natively supported by torch.compile",
            "DeepSpeed": "Setting accelerator to CPU. If you have a GPU, we were unable to detect it.",
        }
        logging.getLogger(logger).warning(known[logger])
        logging.getLogger(logger).warning("this quantisation needs a GPU")
    finally:
        logging.getLogger(logger).removeHandler(listener)
    assert heard == ["this quantisation needs a GPU"]
