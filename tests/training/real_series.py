"""Losses and gradient norms of a real training, step by step, for tests of the guard; `real_series.json` holds them.

`python tests/training/real_series.py` writes that file anew (a minute): an S4D of 60,000 parameters on bytes, with Adam
and no clipping. Python's help texts with a warm-up of 40 steps, then Python's source; a restart with a fresh Adam at
the full rate; then sentences of a tiny grammar, which are learnt soon, and from them back to the help texts.
"""

import argparse
import inspect
import json
import typing
from pathlib import Path

import torch
from harness import made_up_text

FILE = Path(__file__).with_suffix(".json")
# phase: (steps, text)
PHASES = {
    "warm-up": (200, "help"),
    "change of data": (150, "source"),
    "restart": (100, "source"),
    "easy data": (150, "grammar"),
    "hard data": (100, "help"),
}


def record() -> dict[str, dict[str, list[float]]]:
    """Phase -> {"loss": [...], "gradient norm": [...]}, of each step."""
    from pydoc_data.topics import topics

    from ssm_lm import S4Config, S4ForCausalLM

    torch.manual_seed(0)
    torch.set_num_threads(1)
    texts = {
        "help": "".join(topics.values()),
        "source": inspect.getsource(argparse) + inspect.getsource(typing),
        "grammar": made_up_text(6000, seed=0),
    }
    streams = {name: torch.tensor(list(text.encode())) for name, text in texts.items()}
    model = S4ForCausalLM(
        S4Config(vocab_size=256, hidden_size=64, num_hidden_layers=2, state_size=16, ssm="s4d", chunk_size=32)
    )
    found, optimizer, step = {}, None, 0
    for phase, (steps, text) in PHASES.items():
        if optimizer is None or phase == "restart":
            optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
        losses, norms = [], []
        for _ in range(steps):
            rate = 4e-3 * min(1.0, (step + 1) / 40)
            for group in optimizer.param_groups:
                group["lr"] = rate
            stream = streams[text]
            starts = torch.randint(len(stream) - 128, (8,))
            batch = torch.stack([stream[start : start + 128] for start in starts])
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            norms.append(torch.nn.utils.get_total_norm(gradients).item())
            losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
            step += 1
        found[phase] = {
            name: [float(f"{value:.4g}") for value in values]
            for name, values in (("loss", losses), ("gradient norm", norms))
        }
    return found


if __name__ == "__main__":
    FILE.write_text(json.dumps(record()) + "\n", encoding="utf-8")
