"""An exported folder: complete, private, and loadable where ssm_lm is not."""

import ast
import json
import os
import re
import shutil
import sys

import pytest
import torch

from ssm_lm import S4Config, S4ForCausalLM
from ssm_lm.cli import main
from ssm_lm.data.bpe import train_bpe
from ssm_lm.errors import UserError
from ssm_lm.hub.export import code_files, export
from ssm_lm.loading.model import load_model
from ssm_lm.loading.tokenizer import load_tokenizer

RESULTS = {
    "tokens": 1000,
    "token_perplexity": 12.34567,
    "word_perplexity": 56.78901,
    "word_perplexity_with_line_ends": None,
    "bits_per_byte": 1.23456,
    "protocol": "full context, state carried",
    "split": "test",
    "model": "/home/someone/runs/secret",
    "data": "/home/someone/data",
    "dataset": "prose",
}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """What a training run leaves: the tokenizer above, and checkpoints with the state of the training in them."""
    folder = tmp_path_factory.mktemp("private-name") / "run"
    checkpoint = folder / "checkpoint-7"
    torch.manual_seed(0)
    config = S4Config(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, state_size=8, initializer_range=0.3, eos_token_id=None
    )
    S4ForCausalLM(config).save_pretrained(checkpoint)
    train_bpe(["the cat sat on the mat\n" * 5], 300).save_pretrained(folder)
    for name in ("optimizer.pt", "scheduler.pt", "trainer_state.json", "training_args.bin", "rng_state.pth"):
        (checkpoint / name).write_text("{}")
    return folder


@pytest.fixture(scope="module")
def exported(run_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out") / "tiny-s4"
    (folder.parent / "results.json").write_text(json.dumps(RESULTS))
    arguments = ["export", str(run_folder / "checkpoint-7"), "--output", str(folder)]
    assert main([*arguments, "--results", str(folder.parent / "results.json")]) == 0
    return folder


def test_the_files_and_no_others(exported):
    assert {file.name for file in exported.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "README.md"),
        *("tokenizer.json", "tokenizer_config.json"),
        *(file.name for file in code_files()),
    }
    assert {"configuration_s4.py", "modeling_s4.py", "ssm.py"} <= {file.name for file in code_files()}
    assert [file.name for file in exported.parent.iterdir() if "partial" in file.name] == []
    assert exported.stat().st_mode & 0o777 == 0o777 & ~os.umask(os.umask(0o022))


def test_no_place_of_this_machine(exported, run_folder):
    for file in exported.iterdir():
        content = file.read_bytes()
        for private in (str(run_folder), run_folder.parent.name, "checkpoint-7", "/home/someone", str(exported.parent)):
            assert private.encode() not in content, (file.name, private)


def test_the_card(exported):
    text = (exported / "README.md").read_text()
    parameters = sum(p.numel() for p in load_model(exported).parameters())
    for expected in ("# tiny-s4", f"{parameters:,} parameters", "| state_size | 8 |", "trust_remote_code=True"):
        assert expected in text
    assert "| prose | test | full context, state carried | token perplexity | 12.3457 |" in text
    assert 'target_modules=["down_proj", "out_proj", "up_proj"]' in text
    assert "Apache License 2.0" in text
    assert text.startswith("---\nlibrary_name: transformers\n")


def test_every_source_gives_the_same(exported, run_folder, tmp_path):
    expected = load_model(run_folder / "checkpoint-7")
    for number, source in enumerate((run_folder, run_folder / "checkpoint-7", exported)):
        model = load_model(export(source, tmp_path / str(number)))
        assert load_tokenizer(tmp_path / str(number)).eos_token_id is not None
        for (name, a), b in zip(model.named_parameters(), expected.parameters(), strict=True):
            assert torch.equal(a, b), name


def test_dtype(run_folder, tmp_path):
    export(run_folder, tmp_path / "half", dtype="bfloat16")
    model = load_model(tmp_path / "half")
    kinds = {".ssm." in name: parameter.dtype for name, parameter in model.named_parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    assert "weights in bfloat16" in (tmp_path / "half" / "README.md").read_text()


def test_an_output_that_holds_something_is_left_alone(run_folder, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for name in ("full", "file"):
        with pytest.raises(UserError, match="not an empty folder"):
            export(run_folder, tmp_path / name)
    assert (tmp_path / "full" / "mine").read_text() == (tmp_path / "file").read_text() == "precious"
    (tmp_path / "empty").mkdir()
    export(run_folder, tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").exists()


def test_a_failure_leaves_nothing(run_folder, tmp_path, monkeypatch):
    def disk_full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ssm_lm.hub.export.shutil.copyfile", disk_full)
    with pytest.raises(UserError, match="No space left"):
        export(run_folder, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("run", "tokenizer.json"),
        ("run", "templates"),
        ("run", "checkpoint-7/config.json"),
        ("checkpoint", "chat_template.jinja"),
        ("checkpoint", "checkpoint-7/config.json"),
        ("tokenizer", "tokenizer.json"),
    ],
)
def test_a_link_out_of_a_folder_is_refused(run_folder, tmp_path, given, name):
    """What it names may be anything of this machine, and an export is made to be given away."""
    run = tmp_path / "run"
    shutil.copytree(run_folder, run)
    secret = tmp_path / "secret"
    secret.write_text("{}")
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(secret)
    source = {"run": run, "checkpoint": run / "checkpoint-7", "tokenizer": run_folder}[given]
    with pytest.raises(UserError, match=f"{name}: is a link to a place outside"):
        export(source, tmp_path / "out", tokenizer=run if given == "tokenizer" else None)
    assert not (tmp_path / "out").exists()


def test_links_within_a_folder_and_to_a_folder_are_followed(run_folder, tmp_path):
    """Runs lie on another disk, and a tokenizer's file may stand for another one beside it."""
    shutil.copytree(run_folder, tmp_path / "disk")
    (tmp_path / "disk/tokenizer.json").rename(tmp_path / "disk/the.json")
    (tmp_path / "disk/tokenizer.json").symlink_to("the.json")
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    export(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out/tokenizer.json").is_symlink()


def test_bad_input(run_folder, tmp_path, capsys):
    (tmp_path / "bad.json").write_text('{"protocol": "x"}')
    with pytest.raises(UserError, match="has no key split"):
        export(run_folder, tmp_path / "out", results=[tmp_path / "bad.json"])
    with pytest.raises(UserError, match="cannot be read"):
        export(run_folder, tmp_path / "out", results=[tmp_path / "none.json"])
    load_model(run_folder).save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match=r"tokenizer\.json: no such file"):
        export(tmp_path / "bare", tmp_path / "out")
    train_bpe(["the cat sat on the mat\n" * 5], 300).save_pretrained(tmp_path / "tokenizer")
    export(tmp_path / "bare", tmp_path / "out", tokenizer=tmp_path / "tokenizer")
    capsys.readouterr()
    assert main(["export", str(tmp_path / "nowhere"), "--output", str(tmp_path / "x")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def broken_rules(text, neighbours):
    """What in a module's text the loader of code on the Hub would stumble over."""
    tree = ast.parse(text)
    tried = {
        inner for node in ast.walk(tree) if isinstance(node, ast.Try) for part in node.body for inner in ast.walk(part)
    }
    broken, relative = [], 0
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            relative += 1
            if node.level > 1 or node.module not in neighbours:  # also `from . import x` and `from .a.b import x`
                broken.append(f"line {node.lineno}: not an import of a neighbour")
        elif isinstance(node, ast.Import | ast.ImportFrom) and node not in tried:
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            unknown = {name.split(".")[0] for name in names} - ALLOWED
            broken += [f"line {node.lineno}: {name} may not be installed" for name in unknown]
    # the loader finds neighbours by this look of a line, in a docstring too
    if len(re.findall(r"^\s*(?:from\s+\.\S+\s+import|import\s+\.\S+)", text, flags=re.MULTILINE)) != relative:
        broken.append("a line of text looks like a relative import")
    return broken


ALLOWED = {"torch", "transformers", "numpy", "huggingface_hub", *sys.stdlib_module_names}


@pytest.mark.parametrize("file", code_files(), ids=lambda file: file.name)
def test_the_code_keeps_the_rules_of_the_hub(file):
    assert broken_rules(file.read_text(), {neighbour.stem for neighbour in code_files()}) == []


@pytest.mark.parametrize(
    "text",
    [
        "from . import ops",
        "from .sub.ops import x",
        "from ..errors import UserError",
        "from .missing import x",
        "import triton",
        "def f():\n    import ssm_lm",
        "import einops.layers",
        '"""Use it so:\n\n    from .ops import x\n"""',
    ],
)
def test_the_rules_are_checked(text):
    assert broken_rules(text, {"ops"})


def test_what_the_rules_allow():
    text = (
        "from .ops import (\n    a,\n)\nimport torch.nn as nn\ntry:\n    import triton\nexcept ImportError:\n    pass"
    )
    assert broken_rules(text, {"ops"}) == []
