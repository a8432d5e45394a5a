"""A model that is made, or loaded, for ZeRO 3 on every rank: the most memory that it took, and whether it is the one
that is made whole. `parts_worker.py make|load FOLDER WIDTH LAYERS`: make it, and save it in the folder; or load it.

Each in processes of its own: memory that a model has left behind is not given back to the system when the next one is
made in it. Rank 0's last line: {"bytes": size, "share": of it that was taken}, the larger one of the ranks.
"""

import ctypes
import json
import re
import sys
from pathlib import Path

import torch
from transformers import set_seed

from ssm_lm import S4Config, S4ForCausalLM
from ssm_lm.internals.deepspeed import built_in_parts, own_part
from ssm_lm.loading.model import fill_parts, find_model
from ssm_lm.training.environment import prepare_process

ENGINE = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}


def peak_of(make):
    """(what make() returns, the bytes of memory that this process took more than before, at the most)."""
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before is not to be filled now
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = in_status("VmRSS")
    made = make()
    return made, in_status("VmHWM") - before


def in_status(name: str) -> int:
    return 1024 * int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def in_parts():
    with built_in_parts(ENGINE):
        return S4ForCausalLM(config)


def configured(width: int, layers: int) -> S4Config:
    sizes = {"vocab_size": 4 * width, "hidden_size": width, "num_hidden_layers": layers, "state_size": 16}
    return S4Config(**sizes, ssm="s4d", arch="gated")


def loaded():
    model = in_parts()
    fill_parts(model, find_model(folder)[0])
    return model


def check(model, whole):
    for (name, part), (_, parameter) in zip(model.named_parameters(), whole.named_parameters(), strict=True):
        mine = parameter.data.flatten()[own_part(part)]
        assert torch.equal(part.ds_tensor[: len(mine)], mine), name
        assert part.numel() == 0, name  # nothing of it is left whole


verb, folder, width, layers = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
prepare_process(uses_deepspeed=True)
import deepspeed  # noqa: E402

deepspeed.init_distributed("gloo")
rank = torch.distributed.get_rank()
config = configured(width, 1)
in_parts()  # what is imported and set up now is not counted
config = configured(width, layers)
set_seed(5)
if verb == "make":
    model, peak = peak_of(in_parts)
    drawn = torch.rand(3).tolist()
    set_seed(5)
    whole = S4ForCausalLM(config)
    assert drawn == torch.rand(3).tolist()  # what follows is as without ZeRO
    check(model, whole)
    if rank == 0:
        with torch.no_grad():
            for parameter in whole.parameters():
                parameter.add_(1.0)
        whole.save_pretrained(folder)
else:
    find_model(folder)  # what it imports is not counted
    model, peak = peak_of(loaded)
    whole = find_model(folder)[1].from_pretrained(folder)
    check(model, whole)
total = 4 * sum(parameter.numel() for parameter in whole.parameters())
share = torch.tensor(peak / total)
torch.distributed.all_reduce(share, op=torch.distributed.ReduceOp.MAX)
if rank == 0:
    print(json.dumps({"bytes": total, "share": share.item()}), flush=True)
