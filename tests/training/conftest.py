import hashlib
import json
import os
import shutil

import forked
import pytest
import yaml
from filelock import FileLock
from harness import base_config, made_up_text


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """once(name, make) -> a folder that make(folder) has filled, once for all of pytest-xdist's workers; to be read."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # each worker's own lies in that of the whole session

    def folder_of(name: str, make):
        folder = root / "once" / name
        folder.parent.mkdir(exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.with_suffix(".made").exists():
                shutil.rmtree(folder, ignore_errors=True)  # what a worker that failed has left
                folder.mkdir()
                make(folder)
                folder.with_suffix(".made").touch()
        return folder

    return folder_of


@pytest.fixture(scope="session")
def corpus(once):
    """A folder written by the real `ssm-lm prepare`, with the word-level vocabulary."""
    from ssm_lm.cli import main

    def make(folder):
        text = folder / "text"
        text.mkdir()
        for split, words, seed in (("train", 6000, 0), ("valid", 800, 1), ("test", 800, 2)):
            (text / f"{split}.txt").write_text(made_up_text(words, seed))
        command = ["prepare", "--dataset", str(text), "--tokenizer", "words", "--output", str(folder / "prepared")]
        assert main(command) == 0

    return once("corpus", make) / "prepared"


@pytest.fixture
def write_config(tmp_path, corpus):
    """write_config(**overrides) -> the path of a YAML config for a run in tmp_path."""

    def write(name="run", **overrides) -> str:
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(base_config(corpus, tmp_path / name, **overrides)))
        return str(path)

    return write


class Killed(BaseException):
    """What ends a run as SIGKILL does: nothing catches it."""


@pytest.fixture
def killed_after(monkeypatch):
    """killed_after(step, config): start a run that ends when it has taken so many steps."""

    from ssm_lm.cli import main
    from ssm_lm.training.trainer import S4Trainer

    def start(step, *command):
        plain = S4Trainer.training_step

        def training_step(self, *args, **kwargs):
            if self.state.global_step == step:
                raise Killed
            return plain(self, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(S4Trainer, "training_step", training_step)
            with pytest.raises(Killed):
                main(["train", *command])

    return start


@pytest.fixture(scope="session")
def straight(corpus, once):
    """straight(ranks=1, **overrides) -> the folder of an undisturbed run, made once and only read."""

    def folder_of(ranks=1, **overrides):
        def make(folder):
            config = folder / "run.yaml"
            config.write_text(yaml.safe_dump(base_config(corpus, folder / "run", **overrides)))
            forked.train(str(config), ranks=ranks)

        key = json.dumps([ranks, overrides], sort_keys=True)
        return once(f"straight-{hashlib.sha256(key.encode()).hexdigest()[:16]}", make) / "run"

    return folder_of
