"""The mode recurrent: one token after the other, in plain PyTorch or by the step's kernel; O(1) memory a token."""

import torch

from .discrete import Discrete
from .documents import Documents
from .execution import Execution, Problem, decide, is_any, rule_of


class Memo:
    """What a state space has derived from its parameters for single steps: the discrete system, and what the steps in
    kernels and in C read of it; None until it is needed. No dict: what moves arguments to a device would copy that.

    It is of the parameters that it was derived from: `forget_other_parameters` empties it once they were written to.
    """

    __slots__ = ("discrete", "numbers", "step", "versions")

    def __init__(self):
        self.discrete = self.step = self.numbers = self.versions = None

    def forget_other_parameters(self, layer) -> None:
        """Drop what was derived before an optimizer's step, or whatever else wrote to the parameters of `layer`.

        torch counts the writes to a tensor. It does not count those through `.data`, and a compiled graph does not ask:
        the next forward outside of one does. A parameter that is not there (offloaded, sharded) has its count too.
        """
        if torch.compiler.is_compiling():
            return
        versions = versions_of(layer._parameters.values())  # of each token, and parameters() is slow
        if versions != self.versions:
            self.discrete = self.step = self.numbers = None
            self.versions = versions


def versions_of(parameters) -> list[int]:
    """How often each was written to; nothing of parameters made in torch.inference_mode(), which does not count."""
    try:
        return [p._version for p in parameters]
    except RuntimeError:
        return []


def discrete_from(layer, memo: Memo | None, reverse: bool = False) -> Discrete:
    """The discrete system, from `memo` or kept there."""
    if memo is not None:
        memo.forget_other_parameters(layer)
        if memo.discrete is not None:
            return memo.discrete
    discrete = layer.discretize(reverse)
    if memo is not None and not torch.compiler.is_compiling():
        memo.discrete = discrete  # what a compiled graph puts out is not for keeping, and would recompile it
    return discrete


def coefficients_from(layer, memo: Memo) -> tuple[torch.Tensor, ...]:
    """What the step's kernel reads, from `memo` or kept there."""
    memo.forget_other_parameters(layer)
    if memo.step is not None:
        return memo.step
    coefficients = discrete_from(layer, memo).coefficients()
    if not torch.compiler.is_compiling():
        memo.step = coefficients
    return coefficients


def prepare_steps(layer, memo: Memo, u: torch.Tensor, execution: Execution) -> None:
    """Keep in `memo` what single steps on inputs like u (B, L, H) derive from the parameters."""
    discrete_from(layer, memo)
    if execution.mode != "recurrent":
        execution = decide(layer, Problem("recurrent", 1, u.dtype), rule_of(layer, u))
    if execution.kernel:
        coefficients_from(layer, memo)


def run_steps(layer, x, state, documents: Documents | None, memo: Memo | None, reverse: bool = False):
    """x (B, L, H) in the dtype of the parameters -> y (B, L, H) without D x, the final state."""
    discrete = discrete_from(layer, memo, reverse)
    state = layer.zero_state(x.shape[0], x.device) if state is None else state
    if is_any(x.shape[1]):
        return _run_any_number(discrete, x, state)
    outputs = []
    for t, u in enumerate(x.unbind(1)):
        if documents is not None:
            state = torch.where(documents.begins[:, t, None, None], 0, state)
        y, state = discrete.step(u, state)
        outputs.append(y)
    return torch.stack(outputs, 1), state


def _run_any_number(discrete: Discrete, x, state):
    """As `run_steps`, by an operation that stands for as many steps as there will be."""

    def step(state, u):
        y, state = discrete.step(u, state)
        return state.clone(), y.clone()  # none of them may be a view

    state, outputs = torch._higher_order_ops.scan(step, state, x.transpose(0, 1))
    return outputs.transpose(0, 1), state


def run_steps_on_kernel(layer, u, state, documents: Documents | None, memo: Memo | None, activation: str, in_place):
    """u (B, L, H) -> y with D u and the activation, the final state. in_place: the given state advances at its
    address, where it can.
    """
    coefficients = coefficients_from(layer, Memo() if memo is None else memo)
    if state is None:
        state = layer.zero_state(len(u), u.device)
    elif not (in_place and state.dtype == torch.float32 and state.is_contiguous()):
        state = state.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    if documents is not None:
        u = u.masked_fill((documents.seq_idx < 0)[..., None], 0)
    outputs = []
    for t, token in enumerate(u.unbind(1)):
        if documents is not None:
            state.masked_fill_(documents.begins[:, t, None, None], 0)
        outputs.append(layer.step_on_kernel(token, state, coefficients, activation))
    return outputs[0][:, None] if len(outputs) == 1 else torch.stack(outputs, 1), state


def state_after(layer, x, state, memo: Memo | None, begins: torch.Tensor | None) -> torch.Tensor:
    """The state after x (B, L, H), token by token. begins: (B, L) bool, tokens before which it is set to zero."""
    discrete = discrete_from(layer, memo)
    for t, token in enumerate(x.unbind(1)):
        if begins is not None:
            state = torch.where(begins[:, t, None, None], 0, state)
        _, state = discrete.step(token, state)
    return state
