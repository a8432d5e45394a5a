"""A split in several files is the array that it would be in one."""

import hashlib
import json
import pickle
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssm_lm import cli
from ssm_lm.data.manifest import FORMAT_VERSION, Manifest, ShardInfo, SplitInfo
from ssm_lm.data.shards import ShardedTokens
from ssm_lm.data.stream import TokenStream
from ssm_lm.data.windows import TokenWindows, WindowSampler
from ssm_lm.errors import UserError


def digest(data):
    return hashlib.sha256(data).hexdigest()


def write_sharded(folder, tokens, shard_tokens, vocab_size=1000, unigram=True, tokenizer=b""):
    """A prepared folder with one split, train, in files of `shard_tokens` ids."""
    data = np.array(tokens, dtype="<u2")
    (folder / "train").mkdir(parents=True)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_bytes(tokenizer)
    shards = []
    for number, start in enumerate(range(0, len(data), shard_tokens)):
        name, part = f"train/{number:05}.bin", data[start : start + shard_tokens]
        (folder / name).write_bytes(part.tobytes())
        shards.append(ShardInfo(name, len(part), digest(part.tobytes())))
    if unigram:
        np.bincount(data, minlength=vocab_size).astype("<i8").tofile(folder / "train.unigram")
    counts = "train.unigram" if unigram else ""
    info = SplitInfo(len(data), 1, 1, 1, 1, digest(data.tobytes()), tuple(shards), counts)
    values = {"dataset": "d", "description": "d", "tokenizer": "t", "tokenizer_sha256": "0", "eos_token_id": 0}
    values |= {"vocab_size": vocab_size, "dtype": "uint16", "splits": {"train": info}, "request": {}}
    values["tokenizer_sha256"] = digest(tokenizer)
    Manifest(FORMAT_VERSION, **values, ids_checked=True).write(folder)
    return TokenStream.open(folder, "train")


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """100 ids in files of 16, the last one of 4."""
    return write_sharded(tmp_path_factory.mktemp("several") / "data", range(100), 16)


@given(st.integers(-120, 120), st.integers(-120, 120))
def test_a_slice_is_that_of_one_array(several, start, stop):
    whole = np.arange(100, dtype="<u2")
    found = several.tokens[start:stop]
    assert found.dtype == whole.dtype
    assert found.tolist() == whole[start:stop].tolist()
    if -100 <= start < 100:
        assert several.tokens[start] == whole[start]
    else:
        with pytest.raises(IndexError):
            several.tokens[start]


def test_it_serves_as_an_array(several):
    assert isinstance(several.tokens, ShardedTokens)
    assert several.tokens.shape == (100,)
    assert np.asarray(several.tokens).tolist() == several.tokens.tolist() == list(range(100))
    assert int(np.asarray(several.tokens, dtype=np.int64).sum()) == 4950
    assert not several.tokens[0:5].flags.writeable
    with pytest.raises(ValueError, match="step"):
        several.tokens[::2]
    again = pickle.loads(pickle.dumps(several))
    assert again.tokens.tolist() == list(range(100))


def test_windows_do_not_see_where_a_file_ends(several):
    windows = TokenWindows(several, 7)
    for start in WindowSampler(windows, 3):
        assert windows[start]["input_ids"].tolist() == list(range(start, start + 7))


def test_only_the_files_that_are_read_are_opened(tmp_path):
    write_sharded(tmp_path / "data", range(100), 16)
    (tmp_path / "data" / "train" / "00003.bin").unlink()
    with pytest.raises(UserError, match=r"00003\.bin: no such file"):
        TokenStream.open(tmp_path / "data", "train")
    stream = TokenStream.open(tmp_path / "data", "train", check_files=False)
    assert stream.tokens[64:100].tolist() == list(range(64, 100))
    with pytest.raises(UserError, match=r"00003\.bin: no such file"):
        stream.tokens[40:50]


def test_counts_of_ids_come_from_the_folder(several, tmp_path):
    assert several.unigram_counts().tolist() == [1] * 100 + [0] * 900
    uncounted = write_sharded(tmp_path / "data", [5, 5, 2], 2, vocab_size=6, unigram=False)
    assert uncounted.unigram_counts().tolist() == [0, 0, 1, 0, 0, 2]


def test_verify_names_the_file(tmp_path):
    stream = write_sharded(tmp_path / "data", range(100), 16)
    stream.verify()
    path = tmp_path / "data" / "train" / "00002.bin"
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(UserError, match=r"train/00002\.bin: sha256"):
        stream.verify()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda split: split["shards"].append(split["shards"][1]), "lists train/00001.bin twice"),
        (lambda split: split["shards"].pop(), "have 96 tokens, not 100"),
        (lambda split: split["shards"][0].update(file="../00000.bin"), "which is not in the folder"),
        (lambda split: split["shards"][0].update(tokens="16"), r"shards\[0\].tokens is missing or no int"),
        (lambda split: split.update(shards={}), "shards is missing or no list"),
    ],
)
def test_a_manifest_that_lists_other_files(tmp_path, change, message):
    write_sharded(tmp_path / "data", range(100), 16)
    path = tmp_path / "data" / "manifest.json"
    values = json.loads(path.read_text())
    change(values["splits"]["train"])
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=message):
        TokenStream.open(tmp_path / "data", "train")


def test_a_file_that_was_cut(tmp_path):
    write_sharded(tmp_path / "data", range(100), 16)
    path = tmp_path / "data" / "train" / "00006.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"00006\.bin: 7 bytes, where the manifest's 4 tokens are 8"):
        TokenStream.open(tmp_path / "data", "train")


def test_a_folder_of_version_1_is_read(tmp_path):
    data = np.arange(9, dtype="<u2").tobytes()
    (tmp_path / "train.bin").write_bytes(data)
    values = {"dataset": "d", "description": "d", "tokenizer": "t", "tokenizer_sha256": "0", "vocab_size": 9}
    split = {"tokens": 9, "documents": 1, "words": 1, "lines": 1, "bytes": 1, "sha256": digest(data)}
    values |= {"format_version": 1, "eos_token_id": 0, "dtype": "uint16", "splits": {"train": split}, "request": {}}
    (tmp_path / "manifest.json").write_text(json.dumps(values))
    stream = TokenStream.open(tmp_path, "train")
    assert isinstance(stream.tokens, np.memmap)
    assert (stream.tokens.tolist(), stream.manifest.ids_checked) == (list(range(9)), False)
    assert stream.unigram_counts().tolist() == [1] * 9
    stream.verify()


def change_byte(path):
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)


def swap(folder):
    """The files of two shards change places, with what the manifest says of each."""
    path = folder / "manifest.json"
    values = json.loads(path.read_text())
    shards = values["splits"]["train"]["shards"]
    shards[0], shards[1] = shards[1], shards[0]
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: change_byte(folder / "train" / "00001.bin"), r"train/00001\.bin: sha256"),
        (lambda folder: (folder / "train" / "00004.bin").unlink(), r"train/00004\.bin: no such file"),
        (lambda folder: (folder / "train" / "00004.bin").write_bytes(b""), r"00004\.bin: 0 bytes, where"),
        (lambda folder: change_byte(folder / "train.unigram"), r"train\.unigram: is not how often"),
        (lambda folder: change_byte(folder / "tokenizer" / "tokenizer.json"), r"is another tokenizer"),
        (swap, "in another order"),
    ],
)
def test_the_verb_names_what_is_wrong(tmp_path, refused, capsys, change, message):
    folder = tmp_path / "data"
    write_sharded(folder, range(100), 16, tokenizer=b"a tokenizer")
    assert cli.main(["verify", str(folder)]) == 0
    assert "train: 100 tokens in 7 files" in capsys.readouterr().out
    change(folder)
    assert re.search(message, refused("verify", folder))


def test_the_verb_finds_an_id_beyond_the_vocabulary(tmp_path, refused):
    write_sharded(tmp_path / "data", [3, 9, 1, 4], 2, vocab_size=10, tokenizer=b"a tokenizer")
    path = tmp_path / "data" / "manifest.json"
    path.write_text(path.read_text().replace('"vocab_size": 10', '"vocab_size": 9'))
    assert "holds the token 9, its tokenizer has only 9" in refused("verify", tmp_path / "data")
