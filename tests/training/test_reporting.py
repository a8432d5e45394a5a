"""Where a run reports to: what transformers' callbacks hand to each service, without a network.

wandb and trackio are stand-ins: they bring a service's binary and a web framework, 108 MB, and what is to be known is
that the entries reach their `log`. TensorBoard is a dependency: test_train.py reads what is written for it.
"""

import sys
import types

import pytest

from ssm_lm.cli import main


class Notes(dict):
    """The config of a stand-in, and the entries that were logged to it."""

    def __init__(self):
        super().__init__()
        self.logged, self.started, self.finished = [], [], 0

    def update(self, values, allow_val_change=False):
        super().update(values)


def stand_in(name: str, notes: Notes) -> types.ModuleType:
    """A module with those functions of wandb or trackio that transformers' callback calls."""
    module = types.ModuleType(name)
    module.__spec__ = types.SimpleNamespace(name=name)  # by which transformers looks whether it is installed
    module.__version__ = "0"
    module.config, module.run = notes, None

    def init(**options):
        notes.started.append(options)
        module.run = types.SimpleNamespace(_label=lambda **label: None, id="1", name="run", summary={})

    def finish():
        notes.finished += 1

    module.init, module.finish = init, finish
    module.log = lambda values, **options: notes.logged.append(values)
    module.summary = {}
    module.context_vars = types.SimpleNamespace(current_space_id=types.SimpleNamespace(get=lambda: None))
    return module


@pytest.fixture
def service(monkeypatch):
    """service(name) -> the notes of a stand-in that is installed under this name."""

    def install(name):
        notes = Notes()
        modules = {name: stand_in(name, notes)}
        if name == "wandb":
            error = types.ModuleType("wandb.sdk.lib.config_util")
            error.ConfigError = type("ConfigError", (Exception,), {})
            modules |= {part: types.ModuleType(part) for part in ("wandb.sdk", "wandb.sdk.lib")}
            modules[error.__name__] = error
        for part, module in modules.items():
            monkeypatch.setitem(sys.modules, part, module)
        return notes

    return install


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_entries_reach_a_service(name, service, write_config, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "ours")
    notes = service(name)
    config = write_config(report_to=[name], run_name="a run", project="ours", max_steps=3, logging_steps=1)
    assert main(["train", config]) == 0
    assert [options.get("project") for options in notes.started] == ["ours"]
    assert notes.started[0]["name"] == "a run"
    assert (notes["learning_rate"], notes["state_size"]) == (1e-2, 8)
    losses = {entry["train/global_step"]: entry["train/loss"] for entry in notes.logged if "train/loss" in entry}
    assert list(losses) == [1, 2, 3]
    assert {"train/tokens_per_second", "train/grad_norm", "train/flops_per_second"} <= set(notes.logged[0])
