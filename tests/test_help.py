"""What `--help-keys`, "did you mean" and the completion of a shell say, and that they say it at once."""

import dataclasses
import subprocess
import sys

import pytest

from ssm_lm.cli import main
from ssm_lm.config.help import MODEL, OURS, all_keys, help_text
from ssm_lm.config.reading import parse_overrides


@pytest.fixture(scope="module")
def keys():
    return {(key.subject == MODEL, key.name): key for key in all_keys()}


def test_every_key_is_there_with_its_default(keys):
    from ssm_lm import S4Config
    from ssm_lm.config.arguments import S4TrainingArguments
    from ssm_lm.config.keys import model_keys, training_keys

    assert {name for of_model, name in keys if not of_model} == training_keys()
    assert {name for of_model, name in keys if of_model} == set(model_keys())
    for field in dataclasses.fields(S4TrainingArguments):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if not field.name.startswith("_"):
            shown = keys[False, field.name].default
            read = parse_overrides([f"--key={shown}"])["key"] if shown else ""
            assert read == default or field.name == "optim", field.name  # which follows torch's version
    for field in dataclasses.fields(S4Config):
        if (True, field.name) in keys:
            assert parse_overrides([f"--key={keys[True, field.name].default}"])["key"] == field.default, field.name


def test_every_key_has_a_line(keys):
    without = [key.name for key in keys.values() if not key.meaning]
    assert not without
    assert keys[False, "ssm_learning_rate"].subject == OURS
    assert keys[False, "max_grad_norm"].subject == "Regularization & Training Stability"
    assert keys[True, "state_size"].meaning.startswith("order N of every real system")


def test_the_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--help-keys"])
    said = capsys.readouterr().out
    assert said.splitlines()[0] == OURS
    assert max(map(len, said.splitlines())) <= 120
    assert "[cosine]" in said
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--help-keys", "warmup"])
    few = capsys.readouterr().out
    assert "warmup_steps" in few
    assert "bf16" not in few
    assert "no key has 'qqq'" in help_text("qqq")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["eval", "model", "--data", "x", "--contxt", "64"], "did you mean --context?"),
        (["export", "model", "--output", "x", "--licence", "x"], "did you mean --license?"),
        (["runs", "--xyz"], "see `ssm-lm runs --help`"),
    ],
)
def test_a_mistyped_option(capsys, words, expected):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [["--help"], ["train", "--help-keys"], ["runs", "."], ["plot", "--help"], ["completion", "bash"], ["train", "-h"]],
    ids=" ".join,
)
def test_it_comes_without_torch(words):
    code = (
        "import sys; from ssm_lm.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print({'torch', 'transformers', 'matplotlib', 'deepspeed'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "set()\n")


# ---- completion


def complete(*words: str) -> list[str]:
    """What bash offers for the last of the words after `ssm-lm`."""
    script = subprocess.run(
        [sys.executable, "-m", "ssm_lm", "completion", "bash"], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    line = f"COMP_WORDS=(ssm-lm {' '.join(repr(word) for word in words)}); COMP_CWORD={len(words)}; _ssm_lm"
    done = subprocess.run(
        ["bash", "-c", f'{script}\n{line}; printf "%s\\n" "${{COMPREPLY[@]}}"'],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


def test_bash_completes_verbs_options_and_keys(tmp_path):
    assert complete("ex") == ["export"]
    assert "train" in complete("")
    assert complete("eval", "model", "--cont") == ["--context"]
    assert complete("generate", "model", "--dt") == ["--dtype"]  # of a function that several verbs call
    assert complete("train", "run.yaml", "--ssm_l") == ["--ssm_learning_rate"]
    assert complete("train", "run.yaml", "--model.state") == ["--model.state_size"]
    assert complete("completion", "z") == ["zsh"]
    (tmp_path / "one.yaml").touch()
    assert complete("train", str(tmp_path / "o")) == [str(tmp_path / "one.yaml")]


def test_what_completes_is_what_the_parsers_take():
    from ssm_lm.cli import VERBS, build_parser
    from ssm_lm.completion import options

    for verb in VERBS:
        help_of_verb = build_parser(verb).verbs[verb].format_help()
        for option in options(verb):
            assert verb == "train" or option in help_of_verb, (verb, option)


def test_another_shell_is_refused(capsys):
    assert main(["completion", "csh"]) == 2
    assert "csh" in capsys.readouterr().err
