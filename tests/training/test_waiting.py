"""Ranks that wait for the first one."""

import datetime
import os
import sys
import time

import torch
import torch.distributed as dist

from ssm_lm.errors import UserError
from ssm_lm.training import waiting


def start_ranks(tmp_path, work) -> list[tuple[int, str]]:
    """Two forks that form a group with a timeout of 3 seconds; (exit code, output) of each: 0, or 2 for a UserError."""
    children = []
    for rank in range(2):
        out = tmp_path / f"out{rank}"
        child = os.fork()
        if child == 0:
            code = 1
            try:
                sys.stdout = out.open("w")
                os.environ["RANK"] = str(rank)
                timeout = datetime.timedelta(seconds=3)
                dist.init_process_group("gloo", f"file://{tmp_path}/meet", timeout, world_size=2, rank=rank)
                waiting.first_rank_works(work, "works", torch.device("cpu"))
                code = 0
            except UserError:
                code = 2
            finally:
                os._exit(code)
        children.append((child, out))
    return [(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), out.read_text()) for child, out in children]


def test_work_that_takes_longer_than_a_collective_may_ends_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr(waiting, "BEAT", 0.2)
    monkeypatch.setattr(waiting, "SAY_EVERY", 2)
    (code, said), other = start_ranks(tmp_path, lambda: time.sleep(5))
    assert other == (0, "")
    assert code == 0
    assert said.splitlines()[0].startswith("works, 2 s so far")


def test_what_goes_wrong_is_raised_on_the_first_rank(tmp_path):
    def work():
        raise UserError("a damaged shard")

    assert start_ranks(tmp_path, work) == [(2, ""), (0, "")]
