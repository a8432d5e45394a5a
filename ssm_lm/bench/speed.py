"""Generation, prefill and training of models of the same size, side by side on this machine.

All contenders stand in one process and take turns, so that a busy moment of the machine meets all of them; what is said
is the median of the turns, and how far they spread. Weights are random: the time does not depend on them.
"""

import platform
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from ..costs.devices import known_device
from .limits import CPU, bytes_of_a_token, flops_of_a_step, matrix_product, read_bandwidth
from .peers import WITHOUT_CACHE, Size, build, is_ours
from .timing import host_seconds

NEW_TOKENS = 16  # in a turn of generation
TRAINED_TOKENS = {"cpu": 4096, "cuda": 65536}  # in a step of training, at least one sequence


class Turn(NamedTuple):
    """One contender at one length: run() is a turn, which makes `tokens` tokens in the seconds that it returns, of
    which the median is taken. work: what bounds it, the bytes that a token reads or the FLOPs of a turn; None: unknown.
    """

    name: str
    parameters: int
    batch: int
    tokens: int
    run: Callable[[], float]
    work: float | None = None


def measure(
    task: str,
    names: list[str],
    size: Size,
    length: int,
    batch: int,
    dtype: torch.dtype,
    turns: int,
    device: torch.device = CPU,
) -> list[dict]:
    """A row a contender. One that cannot be built or run is a row with the reason under "error"."""
    prepare = {"generate": _generation, "prefill": _prefill, "train": _training}[task]
    contenders, failed = [], {}
    for name in names:
        try:
            model = build(name, size, length + (NEW_TOKENS + 1) * (turns + 2), dtype).to(device)
            contenders.append(prepare(name, model, size, length, batch))
        except Exception as error:  # a peer that another version of transformers has changed ends no comparison
            failed[name] = error
    seconds, peaks = _take_turns(contenders, turns, failed, device)
    done = [turn for turn in contenders if turn.name not in failed]
    product = matrix_product(dtype, device) if task == "train" else None  # one for all of them
    rows = [_row(task, turn, length, dtype, seconds[turn.name], peaks[turn.name], product, device) for turn in done]
    ours = next((row["tokens_per_second"] for row in rows if is_ours(row["model"])), None)
    rows = [row | {"ratio_to_ours": row["tokens_per_second"] / ours if ours else None} for row in rows]
    for name, error in failed.items():
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        rows.append({"task": task, "model": name, "batch": batch, "length": length, "error": reason})
    return rows


def _take_turns(contenders: list[Turn], turns: int, failed: dict, device: torch.device) -> tuple[dict, dict]:
    seconds, peaks = {turn.name: [] for turn in contenders}, {}
    for number in range(turns + 1):  # the first warms up, and is watched for memory
        for turn in contenders:
            if turn.name in failed:
                continue
            before = _reset_peak(device) if number == 0 else None
            try:
                taken = turn.run()
            except Exception as error:
                failed[turn.name] = error
                continue
            if number:
                seconds[turn.name].append(taken)
            else:
                peaks[turn.name] = None if before is None else _peak(device) - before
    return seconds, peaks


def _row(task, turn, length, dtype, seconds, peak, product, device) -> dict:
    median = statistics.median(seconds)
    return {
        "task": task,
        "model": turn.name,
        "parameters": turn.parameters,
        "dtype": str(dtype).removeprefix("torch."),
        "batch": turn.batch,
        "length": length,
        "seconds": median,
        "spread": (max(seconds) - min(seconds)) / median,
        "tokens_per_second": turn.tokens / median,
        "milliseconds_per_token": 1e3 * median / turn.tokens * turn.batch,
        "peak_mib": peak,
        **_limit(task, turn, median, product, dtype, device),
    }


def _limit(task, turn: Turn, median: float, product: float | None, dtype, device: torch.device) -> dict:
    """How near a row comes to what the machine can do; see limits.py. product: FLOP/s of a matrix product. mfu: the
    share of its maker's peak, of a GPU whose data sheet is known.
    """
    if turn.work is None:
        return {}
    if task == "train":
        rate = turn.work / median
        sheet = known_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        mfu = {} if sheet is None else {"mfu": rate / sheet.peak("bf16" if dtype == torch.bfloat16 else "fp32")}
        return {"flops_per_second": rate, "share_of_limit": rate / product} | mfu
    rate = turn.work / (median / turn.tokens * turn.batch)
    return {
        "bytes_per_token": turn.work,
        "gigabytes_per_second": rate / 1e9,
        "share_of_limit": rate / read_bandwidth(turn.work, device),
    }


# ---- the tasks


class _Clock:
    """The times of the tokens of a generate(), as its streamer: first it gets the prompt, then a token at a time."""

    def __init__(self):
        self.times = []

    def put(self, ids) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    def between_tokens(self) -> float:
        """From the first new token to the last: a prompt that a model reads anew before the first is no part of it."""
        return self.times[-1] - self.times[1]


def _generation(name: str, model, size: Size, length: int, batch: int) -> Turn:
    """NEW_TOKENS more after `length` tokens that are in the cache and one; each turn goes on where the last one ended.

    Without a cache, one token: the time of a token is that of a forward over the text.
    """
    cached = name != WITHOUT_CACHE
    new = NEW_TOKENS if cached else 1
    ids = torch.randint(1, size.vocabulary, (batch, length), device=model.device)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    text, work = {"ids": ids, "cache": {}}, None
    if cached:
        with torch.no_grad():
            output = model(ids[:, :-1], use_cache=True, logits_to_keep=1)
        key = next(key for key in output if key in ("cache", "past_key_values", "cache_params"))
        text["cache"] = {key: output[key]}
        work = bytes_of_a_token(model, output[key])

    def run():
        clock = _Clock()
        options = {"max_new_tokens": 1 + new, "do_sample": False, "use_cache": cached, "streamer": clock}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mask = torch.ones_like(text["ids"])
            text["ids"] = model.generate(text["ids"], attention_mask=mask, **options, **text["cache"])
        return clock.between_tokens()

    return Turn(name, model.num_parameters(), batch, new * batch, run, work)


def _prefill(name: str, model, size: Size, length: int, batch: int) -> Turn:
    """The prompt into a fresh cache, to the first token's logits."""
    ids = torch.randint(1, size.vocabulary, (batch, length), device=model.device)

    @torch.no_grad()
    def read():
        model(ids, use_cache=True, logits_to_keep=1)

    return Turn(name, model.num_parameters(), batch, batch * length, partial(host_seconds, read, model.device))


def _training(name: str, model, size: Size, length: int, batch: int) -> Turn:
    """Forward and backward of so many tokens, or one sequence."""
    model.train()
    batch = max(1, TRAINED_TOKENS[model.device.type] // length)
    ids = torch.randint(1, size.vocabulary, (batch, length), device=model.device)

    def step():
        model(ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)

    work = flops_of_a_step(model.config, batch, length)
    return Turn(name, model.num_parameters(), batch, batch * length, partial(host_seconds, step, model.device), work)


# ---- the machine


def machine(device: torch.device = CPU) -> dict:
    """What a figure depends on beside the model."""
    import transformers

    from ..training.record import commit

    return {
        "processor": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _reset_peak(device: torch.device) -> float | None:
    """MiB that the process holds, or its tensors on a GPU; from here on `_peak` counts. None where the system does not
    offer it.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device) / 2**20
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:
        return None


def _peak(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return _status("VmHWM")


def _status(key: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024
