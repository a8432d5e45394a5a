"""What CONTRIBUTING.md says works: its targets exist, and the layer of its example runs."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

from ssm_lm import S4Config, S4ForCausalLM
from ssm_lm.modeling import checks, hippo, mixers, ssm

REPO = Path(__file__).parents[1]


def test_the_make_targets_exist():
    targets = set(re.findall(r"`make ([\w-]+)", (REPO / "CONTRIBUTING.md").read_text()))
    assert len(targets) >= 5
    subprocess.run(["make", "--dry-run", *targets], cwd=REPO, check=True, capture_output=True)


def test_folders_import_what_the_tour_says():
    """And the files beside the folders, which all but modeling may."""
    tour = (REPO / "CONTRIBUTING.md").read_text().split("| it imports |")[1].split("\n\n")[0]
    folders = dict(re.findall(r"^\| `ssm_lm/(\w+)/` \|.*\| ([^|]+) \|$", tour, re.MULTILINE))
    assert set(folders) == {path.parent.name for path in (REPO / "ssm_lm").glob("*/__init__.py")}
    for folder, stated in folders.items():
        for path in (REPO / "ssm_lm" / folder).rglob("*.py"):
            depth = len(path.relative_to(REPO / "ssm_lm").parts)
            found = re.findall(rf"^ *from \.{{{depth}}}(\w+)", path.read_text(), re.MULTILINE)
            for name in set(found) & set(folders):
                assert name in re.findall(r"\w+", stated), f"{path}: {name}"


def test_the_tests_of_the_claims_are_there():
    """So that a claim that loses its test is noticed."""
    table = (REPO / "CONTRIBUTING.md").read_text().split("| claim | test |")[1].split("\n\n")[0]
    named = re.findall(r"`(tests/[\w/.]+)(?:::(\w+))?`", table)
    assert len(named) >= len(table.splitlines()) - 2
    for path, function in named:
        assert (REPO / path).exists(), path
        assert not function or f"def {function}(" in (REPO / path).read_text(), function


@pytest.fixture
def ema(monkeypatch):
    """The layer of the example, with the entries that the list of files asks for."""
    code = re.search(r"```python\n(.*?)```", (REPO / "CONTRIBUTING.md").read_text(), re.DOTALL)[1]
    names = {}
    exec(code, names)
    monkeypatch.setitem(checks.DISCRETIZATIONS, "ema", ("zoh",))
    monkeypatch.setitem(hippo.INITIALIZATIONS, "ema", {"legs": None})
    monkeypatch.setitem(ssm.LAYERS, "ema", names["EMA"])
    make = mixers.make_state_space

    def with_ema(config, channels=None):
        if config.ssm != "ema":
            return make(config, channels)
        return names["EMA"](
            channels or config.hidden_size, config.state_size, config.ssm_init, chunk_size=config.chunk_size
        )

    monkeypatch.setattr(mixers, "make_state_space", with_ema)
    return names["EMA"]


def test_the_layer_of_the_example_is_what_it_says(ema):
    torch.manual_seed(0)
    layer = ema(3, 4, chunk_size=8).double()
    u = torch.randn(2, 30, 3, dtype=torch.float64)
    keep = torch.exp(-layer.log_dt.exp())
    state, expected = torch.zeros(2, 3, 2, dtype=torch.float64), []
    for t in range(30):
        state = keep * state + (1 - keep) * u[:, t, :, None]
        expected.append((state * layer.C).sum(-1) + layer.D * u[:, t])
    for mode in ("chunk", "fft", "recurrent", "auto"):
        y, _ = layer(u, mode=mode)
        torch.testing.assert_close(y, torch.stack(expected, 1), rtol=1e-10, atol=1e-10)
        (gradient,) = torch.autograd.grad(y.sum(), layer.log_dt)
        assert gradient.abs().min() > 0


def test_a_model_of_the_example_generates(ema):
    torch.manual_seed(0)
    config = S4Config(vocab_size=50, hidden_size=8, num_hidden_layers=1, state_size=4, ssm="ema")
    model = S4ForCausalLM(config).eval()
    prompt = torch.randint(1, 50, (1, 40))
    ids = model.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None)
    for end in range(40, 48):  # each token by a full forward, without a cache
        assert model(ids[:, :end], use_cache=False).logits[0, -1].argmax() == ids[0, end]
