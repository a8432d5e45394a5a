import pytest

from ssm_lm import cli

ARTICLES = [
    " \n = Ada = \n \n Ada wrote the first program . \n \n = = Notes = = \n \n She had notes . \n",
    " \n = Bo = \n \n Bo read it ; he was happy . \n",
    " \n = Cy = \n \n Cy 's tea was <unk> . \n \n",
]


@pytest.fixture
def articles():
    """Three articles in WikiText's form."""
    return ARTICLES


@pytest.fixture
def folder(tmp_path):
    """A folder with three splits of small WikiText-like articles."""
    path = tmp_path / "corpus"
    path.mkdir()
    (path / "train.txt").write_text("".join(ARTICLES) * 5, encoding="utf-8")
    (path / "valid.txt").write_text(ARTICLES[1], encoding="utf-8")
    (path / "test.txt").write_text(ARTICLES[2] + " Zoë , 東京 , 🙂 \n", encoding="utf-8")
    return path


@pytest.fixture
def refused(capsys):
    """Run the command line, assert that it refuses in one line with exit code 2, and return the line."""

    def call(*argv):
        capsys.readouterr()
        code = cli.main([str(word) for word in argv])
        error = capsys.readouterr().err
        assert code == 2
        assert error.startswith("ssm-lm: ")
        assert error.endswith("\n")
        assert error.count("\n") == 1
        return error

    return call
