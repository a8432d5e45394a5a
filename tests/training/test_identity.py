"""Which runs are one run: the same result at another speed is."""

import json
from types import SimpleNamespace

import pytest

from ssm_lm import S4Config
from ssm_lm.errors import UserError
from ssm_lm.training.changes import changes
from ssm_lm.training.checkpoints import check_resumable, claim
from ssm_lm.training.identity import KEYED, SPEED_ONLY, TABLES, order_of, run_identity


def identity(**model) -> dict:
    config = S4Config(vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=8, **model)
    return run_identity({"seed": 1}, SimpleNamespace(config=config, fingerprint="text", phases=None), 8)


def folder_of(path, recorded: dict):
    """A run's folder with a checkpoint, as a run of that identity leaves it."""
    (path / "checkpoint-4").mkdir(parents=True)
    (path / "run.json").write_text(json.dumps({"identity": recorded}))
    mark = {"world_size": 1, "step": 4, "identity": recorded, "files": {}}
    (path / "checkpoint-4" / "complete.json").write_text(json.dumps(mark))
    return path


@pytest.mark.parametrize("speed", [{"kernels": "torch"}, {"kernels": "triton"}, {"mode": "fft"}, {"chunk_size": 32}])
def test_another_speed_is_the_same_run(tmp_path, speed):
    assert speed.keys() <= set(SPEED_ONLY)
    folder = folder_of(tmp_path / "run", identity())
    assert claim(folder, identity(**speed)) == {"identity": identity()}
    assert check_resumable(folder / "checkpoint-4", identity(**speed))["step"] == 4


def test_a_run_that_recorded_its_kernels_goes_on_with_others(tmp_path):
    recorded = identity() | {"model": identity()["model"] | {"kernels": "torch"}}
    folder = folder_of(tmp_path / "run", recorded)
    claim(folder, identity())
    check_resumable(folder / "checkpoint-4", identity(kernels="triton"))


def test_a_run_from_before_a_key_goes_on_where_the_key_has_its_default(tmp_path):
    config = {"conv_size": 4, "expand": 2}
    folder = folder_of(tmp_path / "run", identity(arch="h3"))
    assert not config.keys() & identity(arch="h3")["model"].keys()
    claim(folder, identity(arch="h3", **config))
    with pytest.raises(UserError, match="conv_size"):
        claim(folder, identity(arch="h3", conv_size=3))


def test_a_run_keeps_the_order_that_it_began_with():
    assert order_of({}) == KEYED  # a new one
    assert order_of({"identity": {"seed": 1}}) == order_of({"step": 4}) == TABLES  # from before it was recorded
    assert order_of({"identity": {"order": KEYED}}) == KEYED


def test_what_follows_from_another_key_may_be_said_or_not():
    """As in the config that a run writes: ssm_learning_rate is learning_rate where it is not given."""
    recorded = identity() | {"learning_rate": 0.01, "ssm_learning_rate": None}
    said = recorded | {"ssm_learning_rate": 0.01}
    assert changes(recorded, said, 4) == changes(said, recorded, 4) == []
    (change,) = changes(recorded, recorded | {"learning_rate": 0.02}, 4)
    assert change.key == "learning_rate"
    (change,) = changes(recorded, recorded | {"ssm_learning_rate": 0.02}, 4)
    assert change.record() == {"step": 4, "key": "ssm_learning_rate", "from": None, "to": 0.02}


@pytest.mark.parametrize("other", [{"ssm": "s4d"}, {"dt_min": 0.01}])
def test_another_model_is_another_run(tmp_path, other):
    folder = folder_of(tmp_path / "run", identity())
    with pytest.raises(UserError, match=next(iter(other))):
        claim(folder, identity(**other))
    with pytest.raises(UserError, match=next(iter(other))):
        check_resumable(folder / "checkpoint-4", identity(**other))
