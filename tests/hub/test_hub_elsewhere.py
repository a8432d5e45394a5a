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
import builtins
import importlib.util
import sys

sys.path[:0] = sys.argv[1:2]
for name in ("ssm_lm", "deepspeed", "datasets", "accelerate", "lm_eval"):
    assert importlib.util.find_spec(name) is None, name
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    pipeline,
)

root = sys.argv[2]
ids = torch.randint(1, 300, (2, 70), generator=torch.Generator().manual_seed(0))
options = dict(max_new_tokens=16, pad_token_id=0, attention_mask=torch.ones_like(ids))
text_ids = torch.load(f"{root}/model.pt")["text_ids"]


def ask(question=""):
    raise AssertionError(question)


answer, builtins.input = builtins.input, ask  # the tokenizer needs no code, and so no question
assert PreTrainedTokenizerFast.from_pretrained(f"{root}/model-exported")("the cat")["input_ids"] == text_ids
assert not [name for name in sys.modules if name.startswith("transformers_modules.")]
builtins.input = answer


def load(auto, path, **more):
    model, info = auto.from_pretrained(path, trust_remote_code=True, output_loading_info=True, **more)
    assert not any(info.values()), info
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    return model


def check_language_model(path, name="model"):
    model, expected = load(AutoModelForCausalLM, path), torch.load(f"{root}/{name}.pt")
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected["logits"]), f"{path}: logits"
    for way, more in {"greedy": {"do_sample": False}, "beams": {"num_beams": 3}}.items():
        assert torch.equal(model.generate(ids, **more, **options), expected[way]), f"{path}: {way}"
    return model


def check_strategies(model):
    greedy = torch.load(f"{root}/model.pt")["greedy"][:1]
    for how in (
        {"custom_generate": model.strategies["token-recycling"]},
        {"custom_generate": model.strategies["contrastive"], "penalty_alpha": 0.0},
        {"prompt_lookup_num_tokens": 4},
        {"assistant_model": model},
    ):
        one = options | {"attention_mask": options["attention_mask"][:1]}
        assert torch.equal(model.generate(ids[:1], do_sample=False, **how, **one), greedy), how


model = check_language_model(f"{root}/model-exported")
check_strategies(model)
with torch.no_grad():
    hidden = load(AutoModel, f"{root}/model-exported")(ids).last_hidden_state
    assert torch.equal(hidden, torch.load(f"{root}/model.pt")["hidden"]), "AutoModel"
assert AutoConfig.from_pretrained(f"{root}/model-exported", trust_remote_code=True).state_size == 8
half = load(AutoModelForCausalLM, f"{root}/model-exported", dtype=torch.bfloat16)
assert {".ssm." in n: p.dtype for n, p in half.named_parameters()} == {True: torch.float32, False: torch.bfloat16}
tokenizer = AutoTokenizer.from_pretrained(f"{root}/model-exported")
assert tokenizer("the cat")["input_ids"] == text_ids
assert tokenizer.decode(text_ids) == "the cat"
text = pipeline("text-generation", model=f"{root}/model-exported", trust_remote_code=True)("the cat", max_new_tokens=4)
assert text[0]["generated_text"].startswith("the cat")
model.save_pretrained(f"{root}/again")  # copies the code once more
check_language_model(f"{root}/again")
check_language_model(f"{root}/model")  # by save_pretrained alone
for name in ("adaptive", "ssd"):
    check_language_model(f"{root}/{name}-exported", name)
for name in ("tokens", "numbers"):
    expected = torch.load(f"{root}/{name}.pt")
    with torch.no_grad():
        logits = load(AutoModelForSequenceClassification, f"{root}/{name}-exported")(**expected["inputs"]).logits
    assert torch.equal(logits, expected["logits"]), name
assert not any(name.startswith("ssm_lm") for name in sys.modules)
print("all is well")
"""

IDS = torch.randint(1, 300, (2, 70), generator=torch.Generator().manual_seed(0))
LANGUAGE_MODELS = {  # the folder's name -> what the config has beside the sizes
    "model": {},
    "adaptive": {"adaptive_cutoffs": [100, 200]},
    "ssd": {"ssm": "ssd", "arch": ["gated", "swiglu"], "expand": 1},
}


def write_models(root: Path) -> None:
    """The folders that ELSEWHERE loads, and what it is to find."""
    options = dict(max_new_tokens=16, pad_token_id=0, attention_mask=torch.ones_like(IDS))
    for name, keys in LANGUAGE_MODELS.items():
        torch.manual_seed(0)
        model = S4ForCausalLM(S4Config(**SIZES, **keys, eos_token_id=None)).eval()
        if name == "adaptive":
            torch.nn.init.normal_(model.lm_head.projection_0)
        model.save_pretrained(root / name)
        train_bpe(["the cat sat on the mat\n" * 5], 300).save_pretrained(root / name)
        export(root / name, root / f"{name}-exported")
        with torch.no_grad():
            found = {
                "logits": model(IDS).logits,
                "hidden": model.model(IDS).last_hidden_state,
                "greedy": model.generate(IDS, do_sample=False, **options),
                "beams": model.generate(IDS, num_beams=3, **options),
                "text_ids": load_tokenizer(root / name)("the cat")["input_ids"],
            }
        torch.save(found, root / f"{name}.pt")
    for name, inputs in (("tokens", {"input_ids": IDS}), ("numbers", {"inputs_embeds": torch.randn(2, 70, 3)})):
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
