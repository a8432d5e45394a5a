"""What the tests of training share: made-up text, a small config, and a way to launch the real command."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).parents[2]


def made_up_text(words: int, seed: int) -> str:
    """Sentences from a tiny grammar: something to learn, the same on every machine."""
    rng = random.Random(seed)
    subjects, verbs = ["the cat", "a dog", "the old owl", "my friend"], ["sees", "follows", "hears", "likes"]
    objects, ends = ["the moon", "a bird", "the river", "an apple"], ["today", "at night", "again", "in spring"]
    lines = []
    while sum(len(line.split()) for line in lines) < words:
        lines.append(" ".join(rng.choice(part) for part in (subjects, verbs, objects, ends)) + " .\n")
    return "".join(lines)


def base_config(corpus, output_dir, **overrides) -> dict:
    config = {
        "model": {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 8, "ssm": "s4", "chunk_size": 16},
        "data": str(corpus),
        "output_dir": str(output_dir),
        "sequence_length": 40,
        "per_device_train_batch_size": 4,
        "max_steps": 20,
        "learning_rate": 1e-2,
        "ssm_learning_rate": 3e-3,
        "warmup_steps": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": 1,
    }
    return config | overrides


def process_environment(**extra) -> dict:
    """For a subprocess: this checkout first on the path, one thread, no network, none of a launcher's variables."""
    launchers = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {key: value for key, value in os.environ.items() if key not in launchers}
    environment |= {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return environment | {key: str(value) for key, value in extra.items()}


def train_command(config: str, *overrides: str, ranks: int = 1) -> list[str]:
    """The command of the README: plain for one rank, under torchrun for more."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    return [sys.executable, *launcher, "-m", "ssm_lm", "train", config, *overrides]


def run(command: list[str], **environment) -> subprocess.CompletedProcess:
    """Run to the end; fail the test with the process's output if it fails."""
    done = subprocess.run(
        command, cwd=REPO, env=process_environment(**environment), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def zero(stage: int) -> str:
    """The DeepSpeed config of a ZeRO stage."""
    return str(REPO / "configs" / "deepspeed" / f"zero{stage}.json")


def losses(output_dir) -> list[float]:
    """The training losses of a finished run, one a step."""
    history = json.loads((Path(output_dir) / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def rewind(source, target, step: int) -> None:
    """A copy of a finished run as it was after `step`."""
    shutil.copytree(source, target)
    for folder in target.glob("checkpoint-*"):
        if int(folder.name.removeprefix("checkpoint-")) > step:
            shutil.rmtree(folder)
    for name in ("model.safetensors", "trainer_state.json"):
        (target / name).unlink()
    run_file = target / "run.json"
    run_file.write_text(json.dumps({"identity": json.loads(run_file.read_text())["identity"]}))
