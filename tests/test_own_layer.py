"""A layer of one's own, the one of docs/own_layer.md: registered, held to the contract, trained, exported."""

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from ssm_lm import S4Config, S4ForCausalLM, register_layer
from ssm_lm.cli import main
from ssm_lm.contract import check_layer
from ssm_lm.errors import UserError
from ssm_lm.hub.export import write_code
from ssm_lm.modeling import checks, hippo, ssm
from ssm_lm.modeling.ssm import S4, S4D
from ssm_lm.own_layers import load_layers

PAGE = Path(__file__).parents[1] / "docs" / "own_layer.md"


@pytest.fixture
def ema(tmp_path, monkeypatch):
    """The page's layer, from a file that SSM_LM_LAYERS names; forgotten afterwards."""
    for table in (ssm.LAYERS, checks.DISCRETIZATIONS, hippo.INITIALIZATIONS):
        monkeypatch.setitem(table, "ema", None)
    file = tmp_path / "ema.py"
    file.write_text(re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[1])
    monkeypatch.setenv("SSM_LM_LAYERS", str(file))
    load_layers()
    return ssm.LAYERS["ema"]


def test_the_layer_of_the_page_is_what_it_says(ema):
    torch.manual_seed(0)
    layer = ema(3, 4, chunk_size=8).double()
    u = torch.randn(2, 30, 3, dtype=torch.float64)
    keep = torch.exp(-layer.log_dt.exp())
    state, expected = torch.zeros(2, 3, 2, dtype=torch.float64), []
    for t in range(30):
        state = keep * state + (1 - keep) * u[:, t, :, None]
        expected.append((state * layer.C).sum(-1) + layer.D * u[:, t])
    torch.testing.assert_close(layer(u)[0], torch.stack(expected, 1), rtol=1e-10, atol=1e-10)


def test_it_keeps_the_contract(ema):
    check_layer(ema)
    check_layer(S4D, hidden_size=4, n_ssm=2)


class Forgetful(S4D):
    def transition(self, length):
        return 0.99 * super().transition(length)


class Loud(S4D):
    def kernel(self, length, reverse=False):
        return 1.001 * super().kernel(length, reverse)


class Silent(S4D):
    def initial_values(self):
        values = super().initial_values()
        values.pop("B")
        return values


@pytest.mark.parametrize(
    ("wrong", "claim"),
    [(Forgetful, "what is left of a state"), (Loud, "the modes agree"), (Silent, "every parameter is initialised")],
)
def test_a_wrong_layer_is_found_by_its_claim(wrong, claim):
    with pytest.raises(AssertionError, match=f"^{wrong.__name__}: {claim}: "):
        check_layer(wrong)


def test_the_commands_take_it(ema, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    for split in ("train", "valid", "test"):
        (tmp_path / "text" / f"{split}.txt").write_text("the cat sees the moon .\n" * 200)
    (tmp_path / "run.yaml").write_text(
        "model: {hidden_size: 16, num_hidden_layers: 1, state_size: 8, ssm: ema}\ndata: data\noutput_dir: run\n"
        "sequence_length: 32\nmax_steps: 2\nreport_to: []\ndisable_tqdm: true\n"
    )
    assert main(["prepare", "--dataset", "text", "--tokenizer", "bpe:300", "--output", "data"]) == 0
    assert main(["estimate", "run.yaml"]) == 0
    assert main(["train", "run.yaml"]) == 0
    assert main(["generate", "run", "--prompt", "the cat", "--max-new-tokens", "3"]) == 0
    assert main(["export", "run", "--output", "exported"]) == 0
    assert (tmp_path / "exported" / "ema.py").is_file()
    for table in (ssm.LAYERS, checks.DISCRETIZATIONS, hippo.INITIALIZATIONS):
        table.pop("ema")
    monkeypatch.delenv("SSM_LM_LAYERS")
    capsys.readouterr()
    assert main(["generate", "run", "--prompt", "the cat"]) == 2
    said = capsys.readouterr().err
    assert "SSM_LM_LAYERS names its file" in said
    assert len(said.splitlines()) == 1
    for table in (ssm.LAYERS, checks.DISCRETIZATIONS, hippo.INITIALIZATIONS):
        table["ema"] = None  # which the fixture takes away


def test_an_export_registers_it_by_itself(ema, tmp_path, monkeypatch):
    """Its files as a package of their own, which imports nothing of ssm_lm."""
    folder = tmp_path / "exported_with_ema"
    folder.mkdir()
    write_code("ema", folder)
    assert "ssm_lm" not in (folder / "ema.py").read_text().replace("from ssm_lm", "")
    assert not re.findall(r"^ *from ssm_lm", (folder / "ema.py").read_text(), re.MULTILINE)
    monkeypatch.syspath_prepend(tmp_path)
    config = importlib.import_module("exported_with_ema.configuration_s4")  # first, as AutoConfig has it
    assert config.S4Config(vocab_size=9, hidden_size=4, ssm="ema").ssm_init == "legs"
    exported = importlib.import_module("exported_with_ema.ssm").LAYERS["ema"]
    assert exported.__module__ == "exported_with_ema.ema"
    ours, theirs, u = ema(4, 8), exported(4, 8), torch.randn(1, 9, 4)
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(ours(u)[0], theirs(u)[0])
    for name in [name for name in sys.modules if name.startswith("exported_with_ema")]:
        del sys.modules[name]


@pytest.mark.parametrize("line", ["import scipy", "from ssm_lm.files import write_json", "from .other import x"])
def test_what_an_export_cannot_hold_is_refused(ema, tmp_path, monkeypatch, line):
    file = Path(sys.modules["ema"].__file__)
    file.write_text(f"def late():\n    {line}\n\n\n{file.read_text()}")
    with pytest.raises(UserError, match=r"ema\.py, line 2: imports .*, which an export does not hold"):
        write_code("ema", tmp_path)


def test_names_and_files_that_are_none(ema, monkeypatch, tmp_path, capsys):
    for name, cls, error, said in (
        ("s4d", S4D, ValueError, "is taken by S4D"),
        ("other", ema, ValueError, "must be 'other'"),
        ("ema", torch.nn.Linear, TypeError, "is a subclass of StateSpace"),
    ):
        with pytest.raises(error, match=said):
            register_layer(name, cls)
    monkeypatch.setenv("SSM_LM_LAYERS", "no/such.py")
    assert main(["runs", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        "ssm-lm: SSM_LM_LAYERS: there is no file no/such.py; give the Python file of a layer\n"
    )
    with pytest.raises(StrictDataclassError, match="a layer of your own is registered first"):
        S4ForCausalLM(S4Config(vocab_size=9, hidden_size=4, ssm="emu"))


@pytest.mark.parametrize("base", [S4, S4D])
def test_operators_of_ones_own_need_not_take_a_skip(base):
    """As `StateSpace.operators` has them: D is added to the first tap of what they return."""

    class Own(base):
        def operators(self, length, reverse=False):
            return super().operators(length, reverse)

    torch.manual_seed(0)
    own, u = Own(3, 4, chunk_size=8), torch.randn(2, 20, 3)
    layer = base(3, 4, chunk_size=8)
    layer.load_state_dict(own.state_dict())
    assert torch.equal(own(u, mode="chunk")[0], layer(u, mode="chunk")[0])
