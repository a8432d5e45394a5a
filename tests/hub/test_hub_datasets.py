"""A data set of the Hub is streamed: nothing is kept, nothing read twice, and what is done survives a broken stream."""

import gzip
import io
import json
import random

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hub_server import TOKEN, HubServer, Repo
from huggingface_hub import HfFileSystem, constants

from ssm_lm import cli
from ssm_lm.data import hub_datasets
from ssm_lm.data.bpe import train_bpe
from ssm_lm.data.manifest import Manifest
from ssm_lm.data.prepare import prepare
from ssm_lm.errors import UserError

FILES = 3


@pytest.fixture
def refused(capsys):
    """Run the command line, assert that it refuses in one line, and return the line."""

    def call(*argv):
        capsys.readouterr()
        assert cli.main([str(word) for word in argv]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    return call


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with HubServer() as hub:
        for module, name in ((constants, "ENDPOINT"), (datasets.config, "HF_ENDPOINT")):
            monkeypatch.setattr(module, name, hub.url)
        address = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
        for module in (constants, datasets.config):
            monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        HfFileSystem.clear_instance_cache()
        yield hub
        HfFileSystem.clear_instance_cache()


def texts_of(number):
    """Random letters, which do not compress: two megabytes a file."""
    choose = random.Random(number)
    return [letters(choose, 4000) for _ in range(600)]


def letters(choose, number):
    return choose.randbytes(number).translate(bytes(ord("abcdefgh "[byte % 9]) for byte in range(256))).decode()


def parquet(texts):
    """The bytes of a Parquet file with a second column as large as the text's, in six row groups."""
    file = io.BytesIO()
    other = [letters(random.Random(text), len(text)) for text in texts]
    table = pyarrow.table({"other": other, "text": texts})
    pyarrow.parquet.write_table(table, file, row_group_size=100, use_dictionary=False, write_statistics=False)
    return file.getvalue()


@pytest.fixture(scope="module")
def files():
    return {f"data/train-{number:05}-of-{FILES:05}.parquet": parquet(texts_of(number)) for number in range(FILES)}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "bpe"
    train_bpe([text[:400] for text in texts_of(0)], 300).save_pretrained(folder)
    return folder


@pytest.fixture
def repo(hub, files, monkeypatch):
    monkeypatch.setattr(hub_datasets, "RANGE_BYTES", 600_000)
    hub.repos["datasets/org/prose"] = Repo(private=False)
    hub.repos["datasets/org/prose"].branches["main"] = dict(files)
    return hub.repos["datasets/org/prose"]


def contents(folder):
    return {
        path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"
    }


def test_a_stream_that_breaks_off_is_taken_up(hub, repo, files, tokenizer, tmp_path, refused):
    argv = ["prepare", "--dataset", "hub:org/prose", "--tokenizer", str(tokenizer), "--output", str(tmp_path / "out")]
    argv += ["--hold-out", "0.05", "--workers", "1"]
    hub.fail = {"train-00002": 403}
    line = refused(*argv)
    assert "train-00002" in line
    assert "what is done is kept, and the same command goes on" in line
    hub.fail = {}
    pinned = repo.heads["main"]
    before = dict(hub.sent)
    # the branch moves on: what was begun stays at its commit
    repo.branches["later"], repo.heads["later"] = repo.branches["main"], pinned
    repo.branches["main"], repo.heads["main"] = {"data/train.parquet": parquet(["other"] * 3)}, "f" * 40
    assert cli.main(argv) == 0
    manifest = Manifest.read(tmp_path / "out")
    assert manifest.request["source"] == {"hub": "org/prose", "config": None, "revision": pinned}
    assert hub.sent["train-00000-of-00003.parquet"] - before["train-00000-of-00003.parquet"] < 200_000  # its end
    for name, content in files.items():
        assert hub.sent[name.removeprefix("data/")] < 0.8 * len(content), name  # one of two columns, once
    local = tmp_path / "local"
    for name, content in files.items():
        (local / name).parent.mkdir(parents=True, exist_ok=True)
        (local / name.replace("train-", "part-")).write_bytes(content)
    prepare(local, tokenizer, tmp_path / "same", hold_out=0.05)
    assert contents(tmp_path / "same") == contents(tmp_path / "out")
    assert cli.main(argv) == 0  # it is there, whatever main is now
    kept = [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size > 500_000]
    assert not [path for path in kept if path.suffix not in (".bin", ".parquet")]


def test_files_of_other_kinds_are_streamed_by_datasets(hub, tokenizer, tmp_path):
    repo = hub.repos["datasets/org/rows"] = Repo(private=False)
    rows = {name: [f"{name} {number} abc" for number in range(40)] for name in ("train", "test")}
    for name, texts in rows.items():
        lines = "".join(json.dumps({"body": text}) + "\n" for text in texts)
        repo.branches["main"][f"data/{name}.jsonl.gz"] = gzip.compress(lines.encode())
    manifest = prepare("hub:org/rows", tokenizer, tmp_path / "out", text_field="body", workers=1)
    assert {name: split.documents for name, split in manifest.splits.items()} == {"train": 40, "test": 40}
    assert manifest.splits["test"].bytes == len("".join(rows["test"]))
    divided = prepare("hub:org/rows", tokenizer, tmp_path / "one", text_field="body", split="test", hold_out=0.2)
    assert sum(split.documents for split in divided.splits.values()) == 40
    assert list(divided.splits) == ["train", "validation", "test"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dataset", "hub:prose"], "write hub:ORG/NAME"),
        (["--dataset", "hub:org/none"], "hub:org/none: could not be had from the Hub"),
        (
            ["--dataset", "hub:org/prose/fr"],
            "could not be had from the Hub: BuilderConfig 'fr' not found",
        ),
        (["--revision", "v9"], "could not be had from the Hub"),
        (["--split", "dev"], "--split dev: hub:org/prose has only train"),
        (["--text-field", "body"], "no field 'body', only other, text"),
        (["--hold-out", "end"], "give a share"),
        (["--hold-out", "0.6"], "between 0 and 0.5"),
    ],
)
def test_mistakes_are_one_line(repo, tokenizer, tmp_path, refused, options, message):
    argv = ["--dataset", "hub:org/prose", *options]
    assert message in refused("prepare", *argv, "--tokenizer", tokenizer, "--output", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_only_the_hub_has_revisions(tmp_path):
    (tmp_path / "train.txt").write_text("a\n")
    for option in ("revision", "split"):
        with pytest.raises(UserError, match=f"--{option} v1: only data sets of the Hub"):
            prepare(tmp_path / "train.txt", "bpe:300", tmp_path / "out", **{option: "v1"})
