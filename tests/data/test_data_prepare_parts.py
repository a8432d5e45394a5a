"""Prepared by any number of processes, in any number of attempts, on any number of machines: the same bytes."""

import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from ssm_lm.data import documents, processes, units, work_folder
from ssm_lm.data.assembly import Run, shards_of
from ssm_lm.data.bpe import train_bpe
from ssm_lm.data.corpora import load_corpus
from ssm_lm.data.encoding import Encoding
from ssm_lm.data.prepare import merge, prepare
from ssm_lm.data.stream import TokenStream
from ssm_lm.errors import UserError

WORDS = ["ada", "bo", "cy", "wrote", "read", "the", "first", "program", "tea", "é", "\n"]


@pytest.fixture(scope="module")
def texts():
    """400 documents, some of them twice or short, one longer than several units."""
    choose = random.Random(0)
    found = [" ".join(choose.choices(WORDS, k=choose.randrange(1, 60))) for _ in range(380)]
    found += [found[7]] * 3 + [found[90]] * 2 + ["x"] * 14
    choose.shuffle(found)
    return [*found, " ".join(choose.choices(WORDS, k=3000))]


@pytest.fixture(scope="module")
def tokenizer(texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "bpe"
    train_bpe(texts, 300).save_pretrained(folder)
    return folder


@pytest.fixture
def rows(texts, tmp_path):
    """The documents as JSON lines."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    monkeypatch.setattr(units, "UNIT_CHARACTERS", 3000)
    monkeypatch.setattr(documents, "RANGE_BYTES", 4000)


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def tokens(folder, split):
    return TokenStream.open(folder, split).tokens[:].tolist()


def expected_tokens(tokenizer_folder, texts):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    return [t for text in texts for t in [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]]


@pytest.mark.parametrize("options", [{}, {"hold_out": 0.1}, {"hold_out": 0.1, "drop_duplicates": True}], ids=str)
def test_the_folder_does_not_depend_on_units_and_processes(rows, tokenizer, tmp_path, monkeypatch, options):
    options |= {"shard_tokens": 2048}
    prepare(rows, tokenizer, tmp_path / "one", workers=1, **options)
    alone = contents(tmp_path / "one")
    assert "train/00003.bin" in alone
    assert {len(alone[f"train/{number:05}.bin"]) for number in range(3)} == {4096}
    monkeypatch.setattr(documents, "RANGE_BYTES", 10**9)
    prepare(rows, tokenizer, tmp_path / "large", workers=1, **options)
    assert contents(tmp_path / "large") == alone
    if "drop_duplicates" in options:  # two processes once
        monkeypatch.setattr(documents, "RANGE_BYTES", 9000)
        monkeypatch.setattr(processes, "ALONE", -1)
        prepare(rows, tokenizer, tmp_path / "two", workers=2, **options)
        assert contents(tmp_path / "two") == alone
    for split in ("train", "validation", "test"):
        TokenStream.open(tmp_path / "one", split).verify()


def test_documents_stay_where_their_hash_says(rows, texts, tokenizer, tmp_path):
    prepare(rows, tokenizer, tmp_path / "all", hold_out=0.1)
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[::2]))
    prepare(rows, tokenizer, tmp_path / "half", hold_out=0.1)
    corpus = load_corpus(rows, hold_out=0.1)
    split_of = {text: corpus.hold_out.split_of(text) for text in texts}
    for name, chosen in (("all", texts), ("half", texts[::2])):
        for split in ("train", "validation", "test"):
            inside = [text for text in chosen if split_of[text] == split]
            assert tokens(tmp_path / name, split) == expected_tokens(tokenizer, inside)
    assert [text for text in texts[::2] if split_of[text] == "test"] == list(corpus["test"])
    assert 20 < sum(split == "validation" for split in split_of.values()) < 60


def test_filters(rows, texts, tokenizer, tmp_path, monkeypatch):
    from ssm_lm.data import duplicates

    monkeypatch.setattr(duplicates, "BUCKET", 50)
    manifest = prepare(rows, tokenizer, tmp_path / "out", hold_out=0.1, min_length=5, drop_duplicates=True)
    split_of = load_corpus(rows, hold_out=0.1).hold_out.split_of
    kept = [text for text in dict.fromkeys(texts) if len(text) >= 5]
    assert len(kept) < len(texts) - 15
    for split, info in manifest.splits.items():
        inside = [text for text in kept if split_of(text) == split]
        assert tokens(tmp_path / "out", split) == expected_tokens(tokenizer, inside)
        assert info.documents == len(inside)
        assert info.words == sum(len(text.split()) for text in inside)
        assert info.lines == sum(text.count("\n") for text in inside)
        assert info.bytes == sum(len(text.encode()) for text in inside)
        counted = np.bincount(tokens(tmp_path / "out", split), minlength=manifest.vocab_size)
        assert TokenStream.open(tmp_path / "out", split).unigram_counts().tolist() == counted.tolist()


def test_a_word_across_units_is_counted_once(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(units, "UNIT_CHARACTERS", 1 << 20)
    (tmp_path / "train.txt").write_text("a" * 2_500_000 + " b\n")
    manifest = prepare(tmp_path / "train.txt", "words", tmp_path / "out")
    assert (manifest.splits["train"].words, manifest.splits["train"].documents) == (2, 1)


def test_parquet_and_compressed_rows_are_the_same_text(rows, texts, tokenizer, tmp_path):
    import gzip

    prepare(rows, tokenizer, tmp_path / "rows", hold_out=0.1)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(rows.read_bytes()))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet", row_group_size=64)
    for name in ("a.jsonl.gz", "a.parquet"):
        prepare(tmp_path / name, tokenizer, tmp_path / f"out-{name}", hold_out=0.1)
        for split in ("train", "validation", "test"):
            assert tokens(tmp_path / f"out-{name}", split) == tokens(tmp_path / "rows", split)


class Killed(BaseException):
    """Stands for kill -9: nothing is tidied up after it."""


def test_a_call_that_ends_anywhere_is_gone_on_from(rows, tokenizer, tmp_path, monkeypatch):
    options = {"hold_out": 0.1, "drop_duplicates": True, "shard_tokens": 2048, "workers": 1}
    prepare(rows, tokenizer, tmp_path / "whole", **options)
    replace, ended, count = os.replace, 0, [0]

    def replace_sometimes(*paths):
        count[0] += 1
        if count[0] in stops:
            raise Killed
        replace(*paths)

    monkeypatch.setattr(os, "replace", replace_sometimes)
    stops = set(range(1, 400, 13))
    for _ in range(60):
        try:
            prepare(rows, tokenizer, tmp_path / "out", **options)
            break
        except Killed:
            ended += 1
    assert ended > 5
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not list(tmp_path.glob("*partial*"))


def test_shares_of_several_machines(rows, tokenizer, tmp_path, capsys, refused):
    from ssm_lm import cli

    prepare(rows, tokenizer, tmp_path / "whole", hold_out=0.1)
    output = tmp_path / "out"
    argv = ["prepare", "--dataset", rows, "--hold-out", "0.1", "--tokenizer", tokenizer, "--output", output]
    argv = [str(word) for word in argv]
    merging = ["prepare", "--merge", "--output", str(output)]
    assert "is not there" in refused(*merging)
    assert cli.main([*argv, "--shard", "2/3"]) == 0
    assert "share 2/3 is done" in capsys.readouterr().out
    assert "parts are not done yet (the first is 0)" in refused(*merging)
    assert "was begun with hold out 0.1, not 0.2" in refused(*argv, "--hold-out", "0.2", "--shard", "1/3")
    for share in ("1/3", "3/3"):
        assert cli.main([*argv, "--shard", share]) == 0
    assert cli.main(merging) == 0
    assert contents(output) == contents(tmp_path / "whole")
    assert cli.main([*argv, "--shard", "1/3"]) == 0  # it is there
    assert "--shard 0/3: write I/N" in refused(*argv, "--shard", "0/3")


def test_a_part_of_another_request_is_refused(rows, tokenizer, tmp_path, refused):
    prepare(rows, tokenizer, tmp_path / "out", hold_out=0.1, shard="1/2")
    prepare(rows, tokenizer, tmp_path / "other", hold_out=0.1, min_length=5, shard="2/2")
    shutil.copytree(tmp_path / "other.partial" / "parts", tmp_path / "out.partial" / "parts", dirs_exist_ok=True)
    assert "is of another request" in refused("prepare", "--merge", "--output", tmp_path / "out")


def test_two_calls_at_once(rows, tokenizer, tmp_path):
    from ssm_lm.data.work_folder import WorkFolder

    with (
        WorkFolder(tmp_path / "out").held(shared=False),
        pytest.raises(UserError, match="another `ssm-lm prepare` is writing it"),
    ):
        prepare(rows, tokenizer, tmp_path / "out")


def test_a_file_that_breaks_off_loses_nothing(rows, tokenizer, tmp_path):
    original = documents.FileRange.__call__

    def vanish(self):
        if self.start >= 8000:
            raise UserError(f"{self.path}: cannot be read: gone")
        return original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents.FileRange, "__call__", vanish)
        with pytest.raises(UserError, match="gone; what is done is kept, and the same command goes on"):
            prepare(rows, tokenizer, tmp_path / "out", workers=1, hold_out=0.1)
    assert len(list((tmp_path / "out.partial" / "parts").rglob("*.json"))) == 2
    prepare(rows, tokenizer, tmp_path / "again", workers=1, hold_out=0.1)
    prepare(rows, tokenizer, tmp_path / "out", workers=1, hold_out=0.1)
    assert contents(tmp_path / "out") == contents(tmp_path / "again")


def test_a_process_that_is_killed_is_one_line(rows, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "ALONE", -1)
    monkeypatch.setattr(processes, "WORKER", "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(UserError, match=r"a process of prepare ended with signal 9 \(fewer --workers"):
        prepare(rows, tokenizer, tmp_path / "out", workers=2, hold_out=0.1)


def test_what_killed_calls_had_begun_to_write_is_not_published(rows, tokenizer, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work_folder.WorkFolder, "publish", lambda *_: sys.exit(3))
        with pytest.raises(SystemExit):
            prepare(rows, tokenizer, tmp_path / "out", hold_out=0.1, shard_tokens=500)
    for name in (".train.bin.partial-0a", "train/.00001.bin.partial-0a", "tokenizer.partial-0a/a.json", "tmp1/0"):
        path = tmp_path / "out.partial" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("rubbish")
    prepare(rows, tokenizer, tmp_path / "out", hold_out=0.1, shard_tokens=500)
    prepare(rows, tokenizer, tmp_path / "again", hold_out=0.1, shard_tokens=500)
    assert contents(tmp_path / "out") == contents(tmp_path / "again")
    assert len(contents(tmp_path / "out" / "train")) > 1


def test_a_process_whose_caller_was_killed_in_the_middle_of_a_unit_ends_in_silence(tmp_path):
    encoding = Encoding(tmp_path, tmp_path, eos_token_id=0, vocab_size=10, dtype="<u2", request="")
    said = pickle.dumps(encoding) + pickle.dumps("a" * 1000)[:500]
    done = subprocess.run([sys.executable, "-c", processes.WORKER], input=said, capture_output=True, check=True)
    assert done.stdout == done.stderr == b""


def attempt(corpus, tokenizer, output):
    """What the process does that is killed: it has two more of its own."""
    documents.RANGE_BYTES, processes.ALONE = 50_000, 0
    prepare(corpus, tokenizer, output, hold_out=0.02, drop_duplicates=True, shard_tokens=50_000, workers=2)


@pytest.mark.long
def test_killed_at_random_moments(tmp_path, tokenizer, texts):
    """SIGKILL, from the first to the last tenth of the time that the whole takes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ssm_lm.data.prepare", "transformers.models.auto.tokenization_auto"])
    corpus = tmp_path / "rows.jsonl"
    with open(corpus, "w") as file:
        for number in range(25):
            file.writelines(json.dumps({"text": f"{number} {text}"}) + "\n" for text in texts)

    def start(name):
        process = context.Process(target=attempt, args=(corpus, tokenizer, tmp_path / name))
        process.start()
        return process

    start("first").join()  # with what is imported once
    begun = time.monotonic()
    start("whole").join()
    seconds, choose, kills = time.monotonic() - begun, random.Random(1), 0
    whole, found = contents(tmp_path / "whole"), []
    while kills < 10:
        process = start("out")
        process.join(choose.uniform(0.1, 0.9) * seconds)
        if process.exitcode is None:
            process.kill()
            kills += 1
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        if (tmp_path / "out").exists():
            found.append(contents(tmp_path / "out") == whole)
            shutil.rmtree(tmp_path / "out")
    start("out").join()
    assert contents(tmp_path / "out") == whole
    assert found
    assert all(found)


def test_token_files_are_full_but_the_last(tmp_path):
    runs = [Run(tmp_path / "a", 3, 10), Run(tmp_path / "b", 0, 4), Run(tmp_path / "c", 7, 6)]
    found = [[(run.path.name, run.start, run.count) for run in shard] for shard in shards_of(runs, 8)]
    assert found == [[("a", 3, 8)], [("a", 11, 2), ("b", 0, 4), ("c", 7, 2)], [("c", 9, 4)]]


def test_merge_of_what_is_done(rows, tokenizer, tmp_path):
    manifest = prepare(rows, tokenizer, tmp_path / "out")
    assert merge(tmp_path / "out") == manifest
