"""`python -m ssm_lm train`, then, on rank 0's last line, the bytes of what the rank keeps between steps: parameters,
master weights and optimizer states, every piece of memory once.
"""

import json
import os
import sys

import torch

import ssm_lm.training.faults as faults
from ssm_lm.cli import main

found = {}
plain = faults.Faults.on_step_end


def kept(trainer):
    for parameter in trainer.model.parameters():
        yield parameter.data
        yield getattr(parameter, "ds_tensor", parameter.data)  # this rank's part under ZeRO 3
    optimizer = trainer.optimizer.optimizer
    for name in ("fp16_partitioned_groups_flat", "fp32_partitioned_groups_flat"):
        yield from getattr(optimizer, name, [])
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def on_step_end(self, args, state, control, **kwargs):
    plain(self, args, state, control, **kwargs)
    if state.global_step == state.max_steps:
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept(self.trainer)
        }
        found["bytes"] = sum(storages.values())


faults.Faults.on_step_end = on_step_end
code = main(sys.argv[1:])
if os.environ.get("RANK", "0") == "0":
    print(json.dumps(found), flush=True)
os._exit(code)  # as ssm_lm.cli.entry does
