"""`ssm-lm sweep --range`: one run over many learning rates."""

import itertools
import json
import math

import pytest
from test_sweep import config, sweep  # noqa: F401  (a fixture)

from ssm_lm.comparison.rate_range import Found, has_risen, summarize
from ssm_lm.training.param_groups import parameter_groups


def test_the_rates_grow_by_a_factor_until_the_loss_rises(config, tmp_path, capsys, monkeypatch):  # noqa: F811
    groups = []

    def watched(*arguments):
        groups.extend(parameter_groups(*arguments))
        return groups

    monkeypatch.setattr("ssm_lm.training.trainer.parameter_groups", watched)
    folder = tmp_path / "range"
    assert sweep(config, folder, "--range", "learning_rate=1e-3,1e3", "--set", "max_steps=40") == 0
    found = json.loads((folder / "rates.json").read_text())
    rates, losses = found["rates"], found["losses"]
    assert rates[0] == pytest.approx(1e-3)
    factors = [after / before for before, after in itertools.pairwise(rates)]
    assert factors == pytest.approx([1e6 ** (1 / 39)] * len(factors))
    assert found["diverged"]
    assert len(rates) == len(losses) < 40  # it did not go on to the end
    assert losses[-1] > min(losses) + 0.1
    assert 1e-3 < found["steepest"] <= found["lowest"] < rates[-1]
    (shares,) = {group["initial_lr"] / groups[0]["initial_lr"] for group in groups if group["name"] == "ssm"}
    assert shares == pytest.approx(0.3)  # as in the config
    assert (folder / "rates.png").read_bytes().startswith(b"\x89PNG")
    assert f"learning_rate {found['suggestion']:.2g}" in capsys.readouterr().out
    assert sorted(path.name for path in folder.iterdir()) == ["rates.json", "rates.png"]


def test_a_curve_is_read_through_its_noise():
    """A fall around 1e-3, the lowest loss at 1e-2, a rise after it."""
    rates = [10 ** (-5 + 0.04 * step) for step in range(100)]
    fall = [8 - 2 / (1 + (1e-3 / rate) ** 2) + 0.05 * math.sin(7 * step) for step, rate in enumerate(rates)]
    losses = [loss + max(0.0, math.log10(rate) + 2) ** 2 * 3 for loss, rate in zip(fall, rates, strict=True)]
    found = summarize(Found(rates, losses, True))
    assert found["steepest"] == found["suggestion"] == pytest.approx(1e-3, rel=0.4)
    assert found["lowest"] == pytest.approx(1e-2, rel=0.4)
    ends = next(end for end in range(1, 101) if has_risen(losses[:end]))
    assert 2e-2 < rates[ends - 1] < 1e-1
    assert not any(has_risen(fall[:end]) for end in range(1, 101))  # which has not risen


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--range", "weight_decay=0,1"], "--range weight_decay=0,1: is written learning_rate=LOW,HIGH"),
        (["--range", "learning_rate=1,1e-3"], "--range learning_rate=1,1e-3"),
        (["--range", "learning_rate=1"], "--range learning_rate=1"),
        (["--range", "learning_rate=1e-5,1", "--key", "seed=1"], "leave out --key"),
        (["--range", "learning_rate=1e-5,1", "--set", "learning_rate=1"], "--set learning_rate"),
        (["--range", "learning_rate=1e-5,1", "--set", "max_steps=5"], "--set max_steps=5"),
    ],
)
def test_mistakes_are_one_line(config, tmp_path, capsys, words, named):  # noqa: F811
    assert sweep(config, tmp_path / "range", *words) == 2
    said = capsys.readouterr().err
    assert named in said
    assert said.count("\n") == 1
    assert not (tmp_path / "range").exists()
