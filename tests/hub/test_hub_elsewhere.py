"""An export where there is torch and transformers, with what these two need, and nothing else.

Those distributions are linked into a folder of their own, which is all that a process started with -I -S sees; it is
the cheap form of a fresh virtual environment.
"""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from ssm_lm import S4Config, S4ForCausalLM, S4ForSequenceClassification
from ssm_lm.auto import AUTO_MAP
from ssm_lm.data.bpe import train_bpe
from ssm_lm.hub.export import code_files, export
from ssm_lm.loading.model import load_model
from ssm_lm.loading.tokenizer import load_tokenizer

SIZES = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "initializer_range": 0.3}


def requirements(names) -> dict[str, importlib.metadata.Distribution]:
    """These distributions and all that they require here, without extras."""
    found, waiting = {}, list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        found[name] = importlib.metadata.distribution(name)
        for text in found[name].requires or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return found


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with links to the top-level files of torch, transformers and their requirements."""
    site = tmp_path_factory.mktemp("elsewhere") / "site-packages"
    site.mkdir()
    for name, distribution in requirements(("torch", "transformers")).items():
        tops = {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}
        assert tops, name
        for top in tops:
            if not (site / top).exists():
                os.symlink(distribution.locate_file(top), site / top)
    return site


ELSEWHERE = """
import importlib.util
import sys

sys.path[:0] = sys.argv[1:2]
for name in ("ssm_lm", "deepspeed", "datasets", "accelerate", "lm_eval"):
    assert importlib.util.find_spec(name) is None, name
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)

root = sys.argv[2]
ids = torch.randint(1, 300, (2, 70), generator=torch.Generator().manual_seed(0))


def load(auto, path):
    model, info = auto.from_pretrained(path, trust_remote_code=True, output_loading_info=True)
    assert not any(info.values()), info
    return model


def check_language_model(path):
    model, expected = load(AutoModelForCausalLM, path), torch.load(f"{root}/model.pt")
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected["logits"]), f"{path}: logits"
    generated = model.generate(ids, max_new_tokens=16, do_sample=False, pad_token_id=0)
    assert torch.equal(generated, expected["greedy"]), f"{path}: greedy"
    return model


model = check_language_model(f"{root}/exported")
with torch.no_grad():
    hidden = load(AutoModel, f"{root}/exported")(ids).last_hidden_state
    assert torch.equal(hidden, torch.load(f"{root}/model.pt")["hidden"]), "AutoModel"
tokenizer = AutoTokenizer.from_pretrained(f"{root}/exported")
text_ids = tokenizer("the cat")["input_ids"]
assert text_ids == torch.load(f"{root}/model.pt")["text_ids"]
assert tokenizer.decode(text_ids) == "the cat"
text = pipeline("text-generation", model=f"{root}/exported", trust_remote_code=True)("the cat", max_new_tokens=4)
assert text[0]["generated_text"].startswith("the cat")
model.save_pretrained(f"{root}/again")  # copies the code once more
check_language_model(f"{root}/again")
check_language_model(f"{root}/run")  # by save_pretrained alone
for name in ("tokens", "numbers"):
    expected = torch.load(f"{root}/{name}.pt")
    with torch.no_grad():
        logits = load(AutoModelForSequenceClassification, f"{root}/{name}-exported")(**expected["inputs"]).logits
    assert torch.equal(logits, expected["logits"]), name
print("all is well")
"""


def write_models(root: Path) -> None:
    """The folders that ELSEWHERE loads, and what it is to find."""
    torch.manual_seed(0)
    model = S4ForCausalLM(S4Config(**SIZES, eos_token_id=None)).eval()
    model.save_pretrained(root / "run")
    train_bpe(["the cat sat on the mat\n" * 5], 300).save_pretrained(root / "run")
    export(root / "run", root / "exported")
    ids = torch.randint(1, 300, (2, 70), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = {
            "logits": model(ids).logits,
            "hidden": model.model(ids).last_hidden_state,
            "greedy": model.generate(ids, max_new_tokens=16, do_sample=False, pad_token_id=0),
            "text_ids": load_tokenizer(root / "run")("the cat")["input_ids"],
        }
    torch.save(found, root / "model.pt")
    for name, inputs in (("tokens", {"input_ids": ids}), ("numbers", {"inputs_embeds": torch.randn(2, 70, 3)})):
        size = 3 if name == "numbers" else None
        classifier = S4ForSequenceClassification(S4Config(**SIZES, num_labels=5, bidirectional=True, input_size=size))
        classifier.eval().save_pretrained(root / name)
        export(root / name, root / f"{name}-exported")
        with torch.no_grad():
            torch.save({"inputs": inputs, "logits": classifier(**inputs).logits}, root / f"{name}.pt")


@pytest.mark.slow
def test_exports_load_with_torch_and_transformers_alone(site, tmp_path):
    write_models(tmp_path)
    (tmp_path / "elsewhere.py").write_text(ELSEWHERE)
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    environment |= {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-I", "-S", str(tmp_path / "elsewhere.py"), str(site), str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "all is well" in done.stdout


def test_all_of_the_code_is_exported():
    """A module that nothing reachable from AUTO_MAP imports would be missing on the Hub."""
    from ssm_lm import modeling

    everything = {file.name for file in Path(modeling.__file__).parent.glob("*.py")} - {"__init__.py"}
    assert {file.name for file in code_files()} == everything


def test_a_plain_save_brings_its_code(tmp_path):
    """And the names of its classes; but no other class than its own."""

    config = S4Config(vocab_size=10, hidden_size=4, num_hidden_layers=1, state_size=2)
    S4ForCausalLM(config).save_pretrained(tmp_path)
    assert {file.name for file in code_files()} <= {file.name for file in tmp_path.iterdir()}
    kept = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert kept == {key: AUTO_MAP[key] for key in ("AutoConfig", "AutoModelForCausalLM")}
    for file in code_files():
        (tmp_path / file.name).write_text("raise SystemExit('ran')")
    assert type(load_model(tmp_path)) is S4ForCausalLM
    shutil.rmtree(tmp_path)


def test_a_classifier_is_no_language_model(tmp_path, capsys):
    from ssm_lm.cli import main

    config = S4Config(vocab_size=10, hidden_size=4, num_hidden_layers=1, state_size=2)
    S4ForSequenceClassification(config).save_pretrained(tmp_path)
    assert main(["eval", str(tmp_path), "--data", str(tmp_path)]) == 2
    assert "holds S4ForSequenceClassification, and S4ForCausalLM is needed here" in capsys.readouterr().err
