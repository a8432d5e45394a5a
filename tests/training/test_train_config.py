import dataclasses
import subprocess
import sys

import pytest
import yaml
from harness import base_config, process_environment

from ssm_lm import S4Config
from ssm_lm.cli import main
from ssm_lm.config.arguments import S4TrainingArguments
from ssm_lm.config.keys import model_keys, training_keys
from ssm_lm.config.reading import parse_overrides, read_train_config
from ssm_lm.errors import UserError


@pytest.fixture
def config_file(tmp_path):
    def write(text):
        path = tmp_path / "config.yaml"
        path.write_text(text if isinstance(text, str) else yaml.safe_dump(text))
        return str(path)

    return write


def test_overrides():
    words = "--learning-rate 1e-3 --model.hidden_size=32 --bf16 --deepspeed null --seed 7".split()
    assert parse_overrides(words) == {
        "learning_rate": 1e-3,
        "model.hidden_size": 32,
        "bf16": True,
        "deepspeed": None,
        "seed": 7,
    }
    with pytest.raises(UserError, match="'stray'"):
        parse_overrides(["stray"])


def test_scalars_are_those_of_yaml_1_2(config_file):
    text = "learning_rate: 1e-3\nweight_decay: .1\nmax_steps: 10\neval_strategy: no\nbf16: false\nmax_grad_norm: 1"
    values = read_train_config(config_file(text), parse_overrides(["--save_strategy", "no"]))
    assert (values["learning_rate"], values["weight_decay"], values["max_steps"]) == (1e-3, 0.1, 10)
    assert (values["eval_strategy"], values["save_strategy"], values["bf16"]) == ("no", "no", False)


def test_a_model_file_is_found_beside_the_config_and_overridden(tmp_path, config_file):
    (tmp_path / "model.yaml").write_text("hidden_size: 8\nstate_size: 4")
    values = read_train_config(config_file("model: model.yaml"), {"model.state_size": 6, "seed": 3})
    assert values == {"model": {"hidden_size": 8, "state_size": 6}, "seed": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "unknown key 'learning_rat'; did you mean 'learning_rate'"),
        ("model: {hiden_size: 8}", "unknown key 'hiden_size'; did you mean 'hidden_size'"),
        ("learning_rate: fast", "learning_rate must be float, not 'fast'"),
        ("max_steps: 1.5", "max_steps must be int"),
        ("bf16: 1", "bf16 must be bool"),
        ("model: nowhere.yaml", "model names nowhere.yaml"),
        ("deepspeed: nowhere.json", "deepspeed names nowhere.json"),
        ("model: 3", "model must be a mapping"),
        ("- a list", "a config is a mapping"),
        ("a: [unclosed", "not valid YAML"),
    ],
)
def test_a_bad_config_is_one_line_and_exit_code_2(config_file, capsys, text, message):
    path = config_file(text)
    assert main(["train", path]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert "config.yaml" in error


def test_the_names_read_from_the_source_are_the_keys():
    ours, theirs = training_keys(), {field.name for field in dataclasses.fields(S4TrainingArguments)}
    assert ours == {name for name in theirs if not name.startswith("_")}
    assert model_keys() == sorted(key for key in S4Config.__annotations__ if not key.startswith("_"))


@pytest.mark.parametrize("text", ["learning_rat: 1", "model: {hiden_size: 8}", "a: [unclosed"])
def test_a_mistyped_key_is_said_without_an_import_of_torch(config_file, text):
    """Which would take ten seconds."""
    code = (
        "import sys; from ssm_lm.cli import main; code = main(['train', sys.argv[1]]); "
        "sys.exit(9 if {'torch', 'transformers'} & set(sys.modules) else code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, config_file(text)], env=process_environment(), capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1


def test_init_from_on_the_command_line_takes_the_place_of_the_model(config_file):
    path = config_file("model: {hidden_size: 8}")
    assert read_train_config(path, {"init_from": "a/model"}) == {"init_from": "a/model", "model": {}}
    both = read_train_config(path, {"init_from": "a/model", "model.hidden_size": 16})
    assert both["model"] == {"hidden_size": 16}  # which is refused: exactly one of them


def test_a_file_is_found_from_the_folders_above_the_config(tmp_path, monkeypatch):
    """As configs/train/quickstart.yaml names configs/model/tiny.yaml, wherever the command is given."""
    for folder in ("configs/train", "configs/model", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "configs/model/tiny.yaml").write_text("hidden_size: 8")
    config = tmp_path / "configs/train/run.yaml"
    config.write_text("model: configs/model/tiny.yaml\nmodel.dropout: 0.1\nmodel.state_size: 4")
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = "../configs/train/run.yaml"
    # keys of the model may stand in the config too: they are of its own model
    found = read_train_config(config, {"model.state_size": 2})
    assert found["model"] == {"hidden_size": 8, "dropout": 0.1, "state_size": 2}
    assert read_train_config(config, {"model": {"hidden_size": 16}})["model"] == {"hidden_size": 16}


def test_verbs(capsys):
    assert main(["trian", "config.yaml"]) == 2
    assert "there is no verb 'trian'; did you mean 'train'?" in capsys.readouterr().err
    assert main(["xyz"]) == 2
    assert "there is no verb 'xyz'; `ssm-lm --help`" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == "ssm-lm 0.1.0\n"


def test_a_missing_config(capsys):
    assert main(["train", "nowhere.yaml"]) == 2
    assert "nowhere.yaml" in capsys.readouterr().err


def test_a_bad_override_names_the_key(write_config, capsys):
    assert main(["train", write_config(), "--learning_rte", "1"]) == 2
    assert "did you mean 'learning_rate'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"data": "nowhere"}, "nowhere"),
        ({"data": None}, "'data' is needed"),
        ({"sequence_length": 1}, "sequence_length must be at least 2"),
        ({"sequence_length": 10**6}, "sequence_length"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1"),
        ({"model": {"hidden_size": 16, "state_size": 5}}, "state_size"),
        ({"model": {"hidden_size": 16, "ssm": "s6"}}, "ssm is one of"),
        ({"model": {"hidden_size": 16, "vocab_size": 5}}, "only 5"),
        ({"model": {}}, "exactly one of 'model' and 'init_from'"),
        ({"init_from": "nowhere", "model": {}}, "nowhere"),
        ({"lr_scheduler_type": "sawtooth"}, "sawtooth"),
        ({"deepspeed": {"bf16": {"enabled": True}}}, "'bf16' would cast"),
        ({"deepspeed": {"optimizer": {}}}, "parameter groups"),
        ({"deepspeed": {"zero_optimization": {"stage": 2}}, "fp16": True}, "fp16 at ZeRO stage 2"),
        ({"deepspeed": {"zero_force_ds_cpu_optimizer": True}}, "another optimizer"),
        ({"spike_threshold": "high"}, "spike_threshold must be"),
        ({"train_batch_size_total": 6}, "no multiple of the 4 sequences"),
        ({"report_to": "wandb"}, "wandb to be installed"),
        ({"report_to": ["paper"]}, "paper"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(corpus, tmp_path, config_file, capsys, overrides, message):
    path = config_file(base_config(corpus, tmp_path / "run", **overrides))
    assert main(["train", path]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()
