"""`python -m ssm_lm`, with faults put in as the environment says. Started by test_faults.py, also under torchrun.

FAULT_STEPS   steps (from 0) whose loss is spoilt, as "5" or "6,7,8"
FAULT_WINDOWS the same, but bound to the batch: the first eight token ids of its first window; ";" between batches
FAULT_FACTOR  what the loss is multiplied by: "nan" or "100"; "wait": it stays, and the rank waits for a signal
FAULT_EVALUATION  steps (from 1) in whose evaluation the rank waits for a signal
FAULT_RANK    the rank that it happens on; all of them without it
SAY_FLUSHED   if set: a line for each file that a rank brings to the disk, and for each rename
RANK_OPTIONS  words that are added to the command on rank 1
"""

import os
import sys
import time

import ssm_lm.training.trainer as trainer_module
from ssm_lm.cli import entry
from ssm_lm.training import checkpoints

rank = int(os.environ.get("RANK", "0"))
factor = os.environ.get("FAULT_FACTOR", "1")
steps = {int(step) for step in os.environ.get("FAULT_STEPS", "").split(",") if step}
windows = os.environ.get("FAULT_WINDOWS", "").split(";")
evaluations = {int(step) for step in os.environ.get("FAULT_EVALUATION", "").split(",") if step}
here = os.environ.get("FAULT_RANK", str(rank)) == str(rank)
plain = trainer_module.S4Trainer.compute_loss


def wait_for_a_signal(trainer, where):
    print(f"waiting in {where} {trainer.state.global_step}", flush=True)
    while trainer.faults.signals.received is None:
        time.sleep(0.01)


def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
    loss = plain(self, model, inputs, return_outputs, num_items_in_batch)
    if model.training:
        first = " ".join(str(token) for token in inputs["input_ids"][0, :8].tolist())
        spoilt = here and (self.state.global_step in steps or first in windows)
        if spoilt and factor == "wait":
            wait_for_a_signal(self, "step")
        elif spoilt:
            self.faults._loss = None  # as if the model itself had returned the spoilt loss
            loss = loss * float(factor)
            self.faults.observe_loss(loss)
    elif here and self.state.global_step in evaluations:
        wait_for_a_signal(self, "the evaluation of step")
    return loss


trainer_module.S4Trainer.compute_loss = compute_loss
flush, rename = checkpoints.flush_to_disk, os.rename
if os.environ.get("SAY_FLUSHED"):
    # one write a line: the ranks share a file
    checkpoints.flush_to_disk = lambda path: (flush(path), os.write(1, f"rank {rank} flushed {path.name}\n".encode()))
    os.rename = lambda old, new: (rename(old, new), os.write(1, f"rank {rank} renamed {new}\n".encode()))
entry(sys.argv[1:] + (os.environ.get("RANK_OPTIONS", "").split() if rank == 1 else []))
