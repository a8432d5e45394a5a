"""What a state space person looks at, for TensorBoard: the layers' steps and memories, norms by layer, a text.

Beside the entries of the log, and into the same file, one step in `observe_steps`:

    log10_dt/LAYER             histogram of log10 dt
    log10_time_constant/LAYER  histogram of log10 -1 / (dt Re Lambda): tokens until a state has lost all but 1/e
    state_norm/LAYER           of the state that the first row of the batch leaves behind, read from a zero state
    gradient_norm/LAYER        of the parameters of each layer of the model, after clipping

and one in `sample_text_steps` a text that the model draws after `sample_text_prompt`.

Rank 0 looks alone, so nothing is read that other ranks hold: the gradients of a layer under DeepSpeed (which has also
stepped by then), the states under sequence parallelism and ZeRO 3, and parameters that ZeRO 3 has parted. Nothing here
draws from the random numbers of the run.
"""

import contextlib
import re

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from ..errors import UserError
from ..modeling.ssm import StateSpace

BINS = 50
NEW_TOKENS = 64  # of a text


class Observation(TrainerCallback):
    """trainer: an `S4Trainer`. Its `training_step` tells the batch to `saw`."""

    def __init__(self, trainer):
        args = trainer.args
        self.trainer, self.row = trainer, None
        self.has_forward = args.zero_stage != 3 and args.sequence_parallel_size == 1  # one that rank 0 can run alone
        self.reads_states = self.has_forward and trainer.is_language_model

    @property
    def writer(self):
        """TensorBoard's, of this run; None before it begins, and where nothing is written to it."""
        found = [c.tb_writer for c in self.trainer.callback_handler.callbacks if isinstance(c, TensorBoardCallback)]
        return found[0] if found and self.trainer.state.is_world_process_zero else None

    def is_due(self) -> bool:
        """Whether the step that is being taken is one to look at; the first one is."""
        every = self.trainer.args.observe_steps
        return every > 0 and self.trainer.state.global_step % every == 0 and self.writer is not None

    def saw(self, inputs: dict) -> None:
        """A batch of the step: its first row is what the states are of."""
        tokens = inputs.get("input_ids")
        if self.reads_states and tokens is not None and self.is_due():
            self.row = tokens[:1]

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """Look at the weights and at the gradients before they change."""
        if not self.is_due():
            return
        model, writer, step = self.trainer.model, self.writer, state.global_step
        for name, values in distributions(model).items():
            writer.add_histogram(name, values, step, bins=BINS)
        norms = {} if args.deepspeed else gradient_norms(model)
        if self.row is not None:
            norms |= state_norms(model, self.row)
            self.row = None
        for name, value in on_the_host(norms).items():
            writer.add_scalar(name, value, step)

    def on_step_end(self, args, state, control, **kwargs):
        every = args.sample_text_steps
        if every > 0 and state.global_step % every == 0 and self.writer is not None:
            text = sample(self.trainer.model, self.trainer.processing_class, args.sample_text_prompt, state.global_step)
            self.writer.add_text("sample", indented(text), state.global_step)


def check_sample_text(args, where: str) -> None:
    """Raise UserError where rank 0 cannot draw a text of the model by itself, or there is no text.

    args: S4TrainingArguments.
    """
    if not args.sample_text_steps:
        return
    for told, what in (
        (args.zero_stage == 3, "ZeRO 3, which parts the weights"),
        (args.sequence_parallel_size > 1, "sequence_parallel_size above 1"),
        (args.task, "task, which has no text"),
    ):
        if told:
            raise UserError(f"{where}: sample_text_steps does not go with {what}; set it to 0")


def distributions(model: nn.Module) -> dict[str, torch.Tensor]:
    """Name -> the finite values of its histogram, of every state space whose parameters are here."""
    found = {}
    for path, layer in state_spaces(model):
        if any(parameter.numel() == 0 for parameter in layer.parameters()):  # ZeRO 3 has parted it
            continue
        values = {"log10_dt": layer.log_dt.detach() / torch.log(torch.tensor(10.0)).item()}
        with torch.no_grad():
            constants = layer.time_constants()
        if constants is not None:
            values["log10_time_constant"] = constants.log10()
        for name, value in values.items():
            value = value[torch.isfinite(value)].float().cpu()
            if value.numel():
                found[f"{name}/{path}"] = value
    return found


def state_spaces(model: nn.Module) -> list[tuple[str, StateSpace]]:
    """(path, layer) of every state space of a model."""
    return [(path, module) for path, module in model.named_modules() if isinstance(module, StateSpace)]


def gradient_norms(model: nn.Module) -> dict[str, torch.Tensor]:
    """Name -> the norm of the gradients there are, by the part that a parameter's path names with its first number
    (model.layers.3), or without one by all but its last word; {} where an engine holds them.
    """
    parts: dict[str, list[torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            part = re.match(r".*?\.\d+(?=\.)", name)
            parts.setdefault(part.group() if part else name.rpartition(".")[0], []).append(parameter.grad)
    return {f"gradient_norm/{part}": nn.utils.get_total_norm(grads) for part, grads in parts.items()}


def state_norms(model: nn.Module, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Name -> the norm of each state space's state after tokens (1, L), from a zero state and without dropout."""
    found = {}

    def keep(path):
        def hook(layer, inputs, outputs):
            if outputs[1] is not None:
                found[f"state_norm/{path}"] = outputs[1].norm()

        return hook

    hooks = [layer.register_forward_hook(keep(path)) for path, layer in state_spaces(model)]
    try:
        if hooks:
            with reading(model):
                model(input_ids=tokens, use_cache=True, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def sample(model: nn.Module, tokenizer, prompt: str, seed: int) -> str:
    """prompt and what the model draws after it; without one, a text from its beginning."""
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"] or [tokenizer.eos_token_id]
    tokens = torch.tensor([ids], device=model.device)
    devices = [model.device] if model.device.type == "cuda" else []
    with reading(model), torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        drawn = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=NEW_TOKENS,
            do_sample=True,
            top_k=0,
            use_cache=True,
            pad_token_id=tokenizer.eos_token_id,
        )
    return tokenizer.decode(drawn[0], skip_special_tokens=True)


@contextlib.contextmanager
def reading(model: nn.Module):
    """Within the block the model is evaluated, without gradients."""
    was = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was)


def on_the_host(numbers: dict[str, torch.Tensor]) -> dict[str, float]:
    """Waits for a device once."""
    if not numbers:
        return {}
    values = torch.stack([number.float() for number in numbers.values()]).tolist()
    return dict(zip(numbers, values, strict=True))


def indented(text: str) -> str:
    """As TensorBoard, which reads markdown, shows a text as it is."""
    return "\n".join("    " + line for line in text.splitlines())
