import pytest
import yaml
from harness import base_config, made_up_text


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder written by the real `ssm-lm prepare`, with the word-level vocabulary."""
    from ssm_lm.cli import main

    folder = tmp_path_factory.mktemp("corpus")
    text = folder / "text"
    text.mkdir()
    for split, words, seed in (("train", 6000, 0), ("valid", 800, 1), ("test", 800, 2)):
        (text / f"{split}.txt").write_text(made_up_text(words, seed))
    prepared = folder / "prepared"
    assert main(["prepare", "--dataset", str(text), "--tokenizer", "words", "--output", str(prepared)]) == 0
    return prepared


@pytest.fixture
def write_config(tmp_path, corpus):
    """write_config(**overrides) -> the path of a YAML config for a run in tmp_path."""

    def write(name="run", **overrides) -> str:
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(base_config(corpus, tmp_path / name, **overrides)))
        return str(path)

    return write
