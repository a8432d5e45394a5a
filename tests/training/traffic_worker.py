"""`python -m ssm_lm train` on a rank, watched until its first step: what it asks of the file system.

`traffic_worker.py train CONFIG ...`. Each rank's last line: {"rank": ..., "step": before which it stood, "sizes": token
files whose size it asked for, "start": bytes of the config, manifest and tokenizer, "read": bytes of all that it read}.
"""

import json
import os
import re
import sys
from pathlib import Path

import yaml

from ssm_lm.cli import main
from ssm_lm.training.trainer import S4Trainer

data = str(yaml.safe_load(Path(sys.argv[2]).read_text())["data"])
opened, asked, found = {sys.argv[2]}, set(), {}
plain_stat, plain_step = os.stat, S4Trainer.training_step


def note_opened(event, arguments):
    if event == "open" and not found and str(arguments[0]).startswith(data):
        opened.add(str(arguments[0]))


def stat(path, *args, **kwargs):
    if not found and re.fullmatch(rf"{data}/.*\.bin", str(path)):
        asked.add(str(path))
    return plain_stat(path, *args, **kwargs)


def bytes_read() -> int:
    return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])


def training_step(self, *args, **kwargs):
    if not found:
        small = [path for path in opened if not path.endswith(".bin") and os.path.isfile(path)]
        found["start"] = sum(map(os.path.getsize, small))
        found["read"], found["step"] = bytes_read() - before, self.state.global_step
    return plain_step(self, *args, **kwargs)


before = bytes_read()
sys.addaudithook(note_opened)
os.stat, S4Trainer.training_step = stat, training_step
code = main(sys.argv[1:])
print(json.dumps(found | {"rank": int(os.environ.get("RANK", "0")), "sizes": len(asked)}), flush=True)
sys.exit(code)
