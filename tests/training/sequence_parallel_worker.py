"""Run by test_sequence_parallel.py under torchrun: one JSON object on rank 0's last line."""

import json
import os
import sys
import threading
import time

import psutil
import torch
import torch.distributed as dist
from torch.nn import functional as F

from ssm_lm import S4Config, S4ForCausalLM
from ssm_lm.training.sequence_parallel import SequenceParallel

PRECISIONS = (torch.float32, torch.float64)


def make_model(dtype=torch.float32, **keys):
    torch.manual_seed(0)
    shape = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 8, "chunk_size": 16}
    model = S4ForCausalLM(S4Config(**(shape | {"arch": "s4-ffn", "dropout": 0.0} | keys))).to(dtype)
    return model.train()


def share_of_loss(model, ids, part) -> torch.Tensor:
    """The slice's share of the mean loss of the whole sequence."""
    shifted = F.pad(ids, (0, 1), value=-100)[:, 1:]
    return model(
        input_ids=ids[:, part],
        labels=ids[:, part],
        shift_labels=shifted[:, part].contiguous(),
        num_items_in_batch=(shifted != -100).sum(),
        skip_logits=True,  # transformers' loss is float32 whatever the model is
    ).loss


def agreement() -> dict:
    results = {}
    size = dist.get_world_size()
    cases = [(ssm, dtype, False, "s4-ffn") for ssm in ("s4", "s4d", "s5") for dtype in PRECISIONS]
    cases += [("s4", torch.float64, True, "s4-ffn")]
    cases += [("s4d", dtype, False, ["h3", "gated"]) for dtype in PRECISIONS]
    cases += [("ssd", torch.float64, False, "gated"), ("ssd-selective", torch.float64, False, "gated")]
    for ssm, dtype, checkpointing, arch in cases:
        ids = torch.randint(31, (2, 24 * size), generator=torch.Generator().manual_seed(1))
        own = {"ssm": ssm.removesuffix("-selective"), "selective_dt": ssm.endswith("-selective"), "arch": arch}
        whole, model = make_model(dtype, **own), make_model(dtype, **own)
        expected = share_of_loss(whole, ids, slice(None))
        expected.backward()
        parallel = SequenceParallel(size)
        parallel.attach(model)
        if checkpointing:
            model.gradient_checkpointing_enable()
        loss = share_of_loss(model, ids, parallel.slice(ids.shape[1]))
        loss.backward()
        loss = loss.detach()
        dist.all_reduce(loss)
        worst, gradients = 0.0, 0
        for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True):
            dist.all_reduce(ours.grad)
            worst = max(worst, float((ours.grad - theirs.grad).norm() / theirs.grad.norm()))
            gradients += 1
        name = f"{ssm} {str(dtype).removeprefix('torch.')} {'recomputed' if checkpointing else 'kept'} {arch}"
        error = float((loss - expected.detach()).abs() / expected.detach().abs())
        results[name] = {"loss": error, "gradient": worst, "gradients": gradients}
    return results


def volume() -> dict:
    """Bytes that a rank's collectives move, forward and backward, at two lengths."""
    sent = {}

    def counted(collective, direction, size_of):
        def call(*args, **kwargs):
            sent[length][direction] += size_of(args)
            return collective(*args, **kwargs)

        return call

    dist.all_gather = counted(dist.all_gather, "forward", lambda args: sum(p.nbytes for p in args[0]))
    dist.all_reduce = counted(dist.all_reduce, "backward", lambda args: args[0].nbytes)
    parallel = SequenceParallel(dist.get_world_size())
    for length in ("256", "4096"):
        sent[length] = {"forward": 0, "backward": 0}
        model = make_model()
        parallel.attach(model)
        ids = torch.randint(31, (2, int(length)), generator=torch.Generator().manual_seed(1))
        share_of_loss(model, ids, parallel.slice(int(length))).backward()
    return sent


def memory() -> dict:
    """Peak of this rank's resident memory above what it held before the step."""
    length = int(sys.argv[2])
    model = make_model(
        ssm="s4d", hidden_size=64, state_size=32, chunk_size=64, num_hidden_layers=2, loss_chunk_size=4096
    )
    parallel = SequenceParallel(dist.get_world_size())
    part = slice(None)
    if parallel.size > 1:
        parallel.attach(model)
        part = parallel.slice(length)
    share_of_loss(model, torch.randint(31, (1, 4096)), parallel.slice(4096)).backward()  # buffers of the first step
    ids = torch.randint(31, (1, length), generator=torch.Generator().manual_seed(1))
    process, peak, done = psutil.Process(), 0, threading.Event()

    def watch():
        nonlocal peak
        while not done.is_set():
            peak = max(peak, process.memory_info().rss)
            time.sleep(0.002)

    dist.barrier()
    before = process.memory_info().rss
    watcher = threading.Thread(target=watch)
    watcher.start()
    share_of_loss(model, ids, part).backward()
    done.set()
    watcher.join()
    return {"peak_mib": (peak - before) / 2**20}


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    result = {"agreement": agreement, "volume": volume, "memory": memory}[sys.argv[1]]()
    if int(os.environ["RANK"]) == 0:
        print(json.dumps(result))
    dist.destroy_process_group()
