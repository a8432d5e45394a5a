"""What a run must come to: a plain training loop without the Trainer, DeepSpeed, checkpoints or schedulers.

Nothing of `ssm_lm/training` is used but the order of the windows and the parameter groups.
"""

import math

import torch
from transformers import set_seed

from ssm_lm import S4Config, S4ForCausalLM
from ssm_lm.data.stream import TokenStream
from ssm_lm.data.windows import TokenWindows, WindowSampler
from ssm_lm.training.param_groups import parameter_groups

BATCH = 4


def factor(step: int, config: dict) -> float:
    """The share of the learning rate in a step, counted from 0, by the formulas of the papers."""
    warmup, steps = config["warmup_steps"], config["max_steps"]
    if step < warmup:
        return step / warmup
    kind = config["lr_scheduler_type"]
    if kind == "warmup_stable_decay":
        decay = config["lr_scheduler_kwargs"]["num_decay_steps"]
        progress = (step - (steps - decay)) / decay
        return 1.0 if progress < 0 else 0.5 * (1 + math.cos(math.pi * progress))
    progress = (step - warmup) / max(1, steps - warmup)
    falling = {"linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    return 1.0 if kind == "constant_with_warmup" else falling[kind]


class PlainLoop:
    """The losses, rates and weights of steps whose config may change; steps are taken once and remembered.

    corpus: a prepared folder; config: the keys that do not change.
    """

    def __init__(self, corpus, config: dict):
        stream = TokenStream.open(str(corpus), "train")
        self.windows = TokenWindows(stream, config["sequence_length"])
        set_seed(config["seed"])
        self.model = S4ForCausalLM(S4Config(vocab_size=stream.vocab_size, **config["model"]))
        groups = parameter_groups(self.model, 1.0, 1.0, 1.0)
        self.optimizer = torch.optim.AdamW(groups, lr=1.0)
        sampler, self.starts = WindowSampler(self.windows, seed=config["seed"]), []
        for epoch in range(3):
            self.starts += sampler.starts(epoch).tolist()
        self.losses, self.rates = [], []

    def take(self, config: dict) -> None:
        """One step with these settings."""
        step, smoothing = len(self.losses), config["label_smoothing_factor"]
        share = factor(step, config)
        rates = {"ssm": config["ssm_learning_rate"]}
        for group in self.optimizer.param_groups:
            group["lr"] = share * rates.get(group["name"], config["learning_rate"])
            group["weight_decay"] = config["weight_decay"] if group["name"] == "decay" else 0.0
            group["betas"] = (0.9, config["adam_beta2"])
        ids = torch.stack([self.windows[s]["input_ids"] for s in self.starts[BATCH * step : BATCH * (step + 1)]])
        logits = self.model(input_ids=ids).logits[:, :-1].float().log_softmax(-1)
        likely = logits.gather(-1, ids[:, 1:, None])
        loss = -((1 - smoothing) * likely.mean() + smoothing * logits.mean())
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), config["max_grad_norm"])
        self.optimizer.step()
        self.losses.append(loss.item())
        self.rates.append(share * config["learning_rate"])
