"""What a start reads and asks of the file system: the same for twenty billion tokens as for a thousand."""

import dataclasses
import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import losses

from ssm_lm.cli import main
from ssm_lm.data.manifest import Manifest, ShardInfo
from ssm_lm.data.sources import check_sources, open_sources
from ssm_lm.errors import UserError
from ssm_lm.training.trainer import S4Trainer
from ssm_lm.training.universal import UNIVERSAL, open_reader

MANY = 20_000_000_000


@pytest.fixture
def folder_of(corpus, tmp_path):
    """folder_of(tokens, files=1) -> a prepared folder whose train split is so many zeros, in files of no disk space."""

    def make(tokens, files=1, **changes):
        folder = tmp_path / f"{tokens}-{files}"
        folder.mkdir()
        shutil.copytree(corpus / "tokenizer", folder / "tokenizer")
        manifest = Manifest.read(corpus)
        shards = tuple(ShardInfo(f"train/{number}.bin", tokens // files, "0") for number in range(files))
        (folder / "train").mkdir()
        for shard in shards:
            with open(folder / shard.file, "wb") as file:
                file.truncate(2 * shard.tokens)
        split = dataclasses.replace(manifest.splits["train"], tokens=tokens, sha256="0", shards=shards)
        values = {"splits": {"train": split}, "ids_checked": True, "format_version": 2} | changes
        dataclasses.replace(manifest, **values).write(folder)
        return folder

    return make


watched = None  # while a start is watched: (the folder, the files that were opened)


def note_opened(event, arguments):
    if watched is not None and event == "open" and str(arguments[0]).startswith(watched[0]):
        watched[1].append(str(arguments[0]))


sys.addaudithook(note_opened)  # once: a hook stays


@pytest.fixture
def watch(tmp_path, monkeypatch):
    """watch(config) -> (stat calls, bytes read, bytes of tokens in memory) below tmp_path until the first step."""

    def start(config):
        global watched
        calls, found = [], {}
        plain_stat, plain_step = os.stat, S4Trainer.training_step

        def stat(path, *args, **kwargs):
            if watched is not None and str(path).startswith(watched[0]):
                calls.append(str(path))
            return plain_stat(path, *args, **kwargs)

        def training_step(self, *args, **kwargs):
            global watched
            if not found:
                opened, watched = watched[1], None
                files = [path for path in set(opened) if not path.endswith(".bin") and os.path.isfile(path)]
                found["read"] = sum(os.path.getsize(path) for path in files)
                found["mapped"] = resident(str(tmp_path))
                found["stats"] = len(calls)
            return plain_step(self, *args, **kwargs)

        watched = (str(tmp_path), [])
        with monkeypatch.context() as patch:
            patch.setattr(os, "stat", stat)
            patch.setattr(S4Trainer, "training_step", training_step)
            assert main(["train", config]) == 0
        return found["stats"], found["read"], found["mapped"]

    return start


def resident(folder: str, ending: str = ".bin") -> int:
    """Bytes of the files below a folder, of token ids or others, that this process has touched through its maps."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = folder in line and line.endswith(ending)
        elif inside and line.startswith("Rss:"):
            found += int(line.split()[1]) * 1024
    return found


def test_a_start_reads_no_more_of_a_large_corpus_than_of_a_small_one(folder_of, write_config, watch):
    small = watch(write_config("small", data=str(folder_of(4_000)), max_steps=1))
    large = watch(write_config("large", data=str(folder_of(MANY)), max_steps=1))
    assert large[0] <= small[0] < 100
    assert abs(large[1] - small[1]) < 100  # digits of numbers in the manifest
    assert large[1] + large[2] < 1_000_000


def test_ids_that_no_manifest_vouches_for_are_read_by_one_rank(folder_of, tmp_path):
    folder = folder_of(4_000, ids_checked=False)
    with open(folder / "train/0.bin", "r+b") as file:
        file.seek(2 * 3_000)
        file.write(np.array([60_000], dtype="<u2").tobytes())
    streams = open_sources([str(folder)])  # what every rank does
    with pytest.raises(UserError, match="holds the token 60000"):
        check_sources(streams, 100)  # what the first one does
    manifest = json.loads((folder / "manifest.json").read_text()) | {"ids_checked": True}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    check_sources(open_sources([str(folder)]), 100)  # believed: `ssm-lm verify` reads


def test_files_are_looked_at_by_one_rank_alone(folder_of, monkeypatch):
    folder = folder_of(2_000_000, files=500)
    calls, plain = [], os.stat
    monkeypatch.setattr(os, "stat", lambda path, *args, **kwargs: calls.append(path) or plain(path, *args, **kwargs))
    streams = open_sources([str(folder)])
    assert len(calls) < 10
    check_sources(streams, 100)
    assert len(calls) > 500
    (folder / "train/7.bin").write_bytes(b"short")
    with pytest.raises(UserError, match=r"train/7\.bin: 5 bytes, where"):
        check_sources(streams, 100)


def test_a_rank_reads_its_own_part_of_the_states_that_another_engine_wrote(tmp_path):
    """Of three files of 16 MB it takes a quarter; the kernel maps a little around it."""
    numbers = torch.arange(4_000_000.0)
    (tmp_path / UNIVERSAL / "zero" / "weight").mkdir(parents=True)
    for key in ("fp32", "exp_avg", "exp_avg_sq"):
        torch.save({"param": numbers}, tmp_path / UNIVERSAL / "zero" / "weight" / f"{key}.pt")
    read = open_reader(tmp_path, {"engine": "zero2", "world_size": 4}, ["weight"])("weight")
    own = {key: value.flatten()[2_000_000:3_000_000].clone() for key, value in read.items()}
    assert all(torch.equal(part, numbers[2_000_000:3_000_000]) for part in own.values())
    assert 12e6 <= resident(str(tmp_path), ".pt") < 24e6


def test_a_run_goes_on_at_its_billionth_step_at_once(folder_of, write_config, tmp_path, killed_after):
    """Without going through the four billion windows before it."""
    keys = {"data": str(folder_of(MANY)), "max_steps": 10**9 + 2, "save_strategy": "steps", "save_steps": 2}
    config = write_config(**keys)
    killed_after(2, config)
    checkpoint = tmp_path / "run" / "checkpoint-1000000000"
    (tmp_path / "run" / "checkpoint-2").rename(checkpoint)
    for name, key in (("trainer_state.json", "global_step"), ("complete.json", "step")):
        said = json.loads((checkpoint / name).read_text()) | {key: 10**9}
        if name == "complete.json":
            said["files"]["trainer_state.json"] = (checkpoint / "trainer_state.json").stat().st_size
        (checkpoint / name).write_text(json.dumps(said))
    assert main(["train", config]) == 0
    entries = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries if "loss" in entry] == [1, 2, 10**9 + 1, 10**9 + 2]
    assert entries[-1]["epoch"] == pytest.approx((10**9 + 2) * 160 / MANY, rel=1e-3)
    assert len(losses(tmp_path / "run")) == 4
