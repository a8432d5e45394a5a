"""`ssm-lm sweep CONFIG --range learning_rate=LOW,HIGH`: one run whose learning rate grows from step to step.

From LOW to HIGH geometrically, both groups in the proportion that the config gives them; it ends where the loss rises.
What is left is loss against rate (`rates.json`, `rates.png`), and a rate to begin a sweep around. Nothing is saved of
the model.

Source: Smith, "Cyclical Learning Rates for Training Neural Networks" (2017), section 3.3.
"""

import math
import tempfile
from pathlib import Path
from typing import NamedTuple

from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, set_seed

from ..config.reading import checked_values, read_yaml
from ..errors import UserError
from ..files import write_json
from ..runs.curves import save
from ..training.environment import release_trainer, set_threads, world_size
from ..training.plan import make_plan

MOST_STEPS = 1000
STEPS = 100  # where --set max_steps says nothing
# of any config: one process that reads nothing, measures nothing else, and leaves out no step
SETTINGS = {
    "lr_scheduler_type": "constant",  # which `train_over` replaces
    "lr_scheduler_kwargs": None,
    "warmup_steps": 0,
    "deepspeed": None,
    "report_to": [],
    "disable_tqdm": True,
    "logging_strategy": "steps",
    "logging_steps": 1,
    "logging_nan_inf_filter": False,
    "eval_strategy": "no",
    "eval_on_start": False,
    "save_strategy": "no",
    "load_best_model_at_end": False,
    "early_stopping_patience": None,
    "resume_from_checkpoint": None,
    "allow_changes": None,
    "profile": 0,
    "spike_threshold": 0.0,
}


class Watch(TrainerCallback):
    """Keeps rate and loss of every step, and ends the training where the loss has risen."""

    def __init__(self):
        self.rates, self.losses, self.diverged = [], [], False

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs:
            return
        rate, loss = logs["learning_rate"], logs["loss"]
        if math.isfinite(loss):
            self.rates.append(rate)
            self.losses.append(loss)
        if state.global_step % (args.max_steps // 10) == 0:
            print(f"step {state.global_step}/{args.max_steps}  loss {loss:.4f}  lr {rate:.2e}", flush=True)
        if not math.isfinite(loss) or has_risen(self.losses):
            self.diverged = control.should_training_stop = True


class Found(NamedTuple):
    """What a range test has seen: the loss of the step taken at each rate, those that are finite; whether it rose."""

    rates: list[float]
    losses: list[float]
    diverged: bool


def run_range(config: str, word: str, overrides: dict, folder: Path) -> None:
    """Test the range that `word` gives, draw it into `folder` and print what it suggests. Raises UserError."""
    low, high = read_range(word)
    values, steps = range_values(config, overrides, low, high)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {folder}: cannot be written to ({error.strerror or error})") from error
    with tempfile.TemporaryDirectory() as scratch:
        found = train_over(values | {"output_dir": scratch}, config, low / high, steps)
    if len(found.rates) < 5:
        raise UserError(
            f"--range {word}: the loss has risen after {len(found.rates)} steps; begin lower, or take more steps by "
            "--set max_steps=N"
        )
    summary = summarize(found) | {"range": [low, high], "max_steps": steps, "config": config}
    try:
        write_json(folder / "rates.json", summary)
    except OSError as error:
        raise UserError(f"--output {folder}: cannot be written to ({error.strerror or error})") from error
    save([lambda axes: draw_rates(axes, summary)], folder / "rates.png")
    print(f"{folder / 'rates.png'}: done")
    if not found.diverged:
        print(f"the loss has not risen much up to {high:g}; a higher end would say more")
    print(
        f"suggestion     learning_rate {summary['suggestion']:.2g}, where the loss falls the fastest, and a sweep "
        f"around it; the lowest loss is at {summary['lowest']:.2g}"
    )


def read_range(word: str) -> tuple[float, float]:
    """(low, high) of learning_rate=LOW,HIGH. Raises UserError."""
    key, _, text = word.partition("=")
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        low = high = math.nan
    if key != "learning_rate" or not 0 < low < high < math.inf:
        raise UserError(f"--range {word}: is written learning_rate=LOW,HIGH, with 0 < LOW < HIGH")
    return low, high


def range_values(config: str, overrides: dict, low: float, high: float) -> tuple[dict, int]:
    """The checked values of the run, but for its folder, and its steps. Raises UserError."""
    values = read_yaml(config)
    for key in ("learning_rate", "output_dir"):
        if key in overrides:
            raise UserError(f"--set {key}: follows from --range and --output; leave it out")
    for key in ("output_dir", "max_steps", "num_train_epochs"):
        values.pop(key, None)
    values = checked_values(values, {"max_steps": STEPS} | overrides, config, config)
    steps = values["max_steps"]
    if not 10 <= steps <= MOST_STEPS:
        raise UserError(f"--set max_steps={steps}: must be from 10 to {MOST_STEPS}, a step a rate")
    own = values.get("ssm_learning_rate")
    share = own / values["learning_rate"] if own and values.get("learning_rate") else 1.0
    return values | SETTINGS | {"learning_rate": high, "ssm_learning_rate": high * share}, steps


def train_over(values: dict, where: str, share: float, steps: int) -> Found:
    """Train from `share` of the config's rates up to them, on this process alone. Raises UserError."""
    from ..training.trainer import LossLines

    if world_size() > 1:
        raise UserError("--range: is for one process; start it without a launcher")
    plan = make_plan(values, where)
    set_threads()
    set_seed(plan.args.seed)
    trainer = plan.task.trainer(plan.task.new_model(), plan.args, None, ())
    trainer.remove_callback(LossLines)
    watch = Watch()
    trainer.add_callback(watch)
    trainer.lr_scheduler = LambdaLR(trainer.create_optimizer(), lambda step: share ** (1 - step / (steps - 1)))
    trainer.train()
    del trainer
    release_trainer()
    return Found(watch.rates, watch.losses, watch.diverged)


def has_risen(losses: list[float]) -> bool:
    """Whether the mean of the last losses lies above the lowest such mean by half of what had been gained, and by a
    twentieth of the first one.
    """
    means = smoothed(losses)
    first, best = means[0], min(means)
    tail = losses[-3:]
    return sum(tail) / len(tail) > best + max((first - best) / 2, first / 20)


def smoothed(losses: list[float]) -> list[float]:
    """Means over a twelfth of the test, around each step."""
    reach = max(1, len(losses) // 25)
    parts = [losses[max(0, at - reach) : at + reach + 1] for at in range(len(losses))]
    return [sum(part) / len(part) for part in parts]


def summarize(found: Found) -> dict:
    """The curve, the rates of its lowest loss and of its steepest fall per factor of rate, and the one suggested.

    That is the one of the steepest fall: at the lowest loss the rate has been too high for some steps.
    """
    means = smoothed(found.losses)
    slopes = [means[at + 1] - means[at - 1] for at in range(1, len(means) - 1)]
    lowest = found.rates[means.index(min(means))]
    steepest = found.rates[1 + slopes.index(min(slopes))]
    return {
        "rates": found.rates,
        "losses": found.losses,
        "smoothed": means,
        "diverged": found.diverged,
        "lowest": lowest,
        "steepest": steepest,
        "suggestion": steepest,
    }


def draw_rates(axes, summary: dict) -> None:
    """Loss against rate, the means over it, and a line at the suggestion."""
    axes.plot(summary["rates"], summary["losses"], color="C0", alpha=0.3, linewidth=1, label="each step")
    axes.plot(summary["rates"], summary["smoothed"], color="C0", linewidth=1.5, label="means")
    axes.axvline(
        summary["suggestion"], color="C1", linestyle="--", linewidth=1, label=f"suggestion {summary['suggestion']:.2g}"
    )
    axes.set_xscale("log")
    first, best = summary["smoothed"][0], min(summary["smoothed"])
    axes.set_ylim(best - 0.1 * (first - best), first + max(0.5 * (first - best), first / 10))
    axes.set_xlabel("learning rate")
    axes.set_title("training loss")
