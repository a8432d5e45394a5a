"""What launchers rely on of `ssm-lm train`, no more: python -m ssm_lm train CONFIG FOLDER STEPS SECONDS_A_STEP.

All ranks add up a number every step, whatever their count the sum is the same; rank 0 keeps a checkpoint of it. SIGTERM
or SIGUSR1 on any rank: all agree, a checkpoint is written, the exit code is 75.
"""

import datetime
import os
import signal
import socket
import sys
import time
from pathlib import Path

if "--dry-run" in sys.argv:
    print(f"plan for {os.environ['WORLD_SIZE']} ranks")
    sys.exit()

import torch
import torch.distributed as dist

asked = []
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda *_: asked.append(1))

_, _, folder, steps, seconds = sys.argv[1:6]
rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=10))
checkpoint = Path(folder, "checkpoint")
step, total = map(float, checkpoint.read_text().split()) if checkpoint.exists() else (0, 0.0)
print(f"begin: rank {rank} of {ranks} on {socket.gethostname()} at step {step:.0f}", flush=True)
while step < float(steps):
    numbers = torch.tensor([(step + 1) / ranks, float(len(asked))], dtype=torch.float64)
    dist.all_reduce(numbers)
    step, total = step + 1, total + numbers[0].item()
    if rank == 0:
        part = Path(folder, "part")
        part.write_text(f"{step} {total}")
        part.replace(checkpoint)
        print(f"step {step:.0f} of {ranks} ranks", flush=True)
    if numbers[1] > 0:
        dist.barrier()
        print(f"left: rank {rank} at step {step:.0f}", flush=True)
        sys.exit(75)
    time.sleep(float(seconds))
dist.barrier()
dist.destroy_process_group()
if rank == 0:
    print(f"done: {total:.6f}", flush=True)
