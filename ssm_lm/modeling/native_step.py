"""The decoding step of a whole model as a flat list of calls into native_library.py: on a CPU, in generate().

The plain step makes thousands of small calls a token, each of them dearer than its arithmetic. Here the sublayers have
been written out, once a cache, as calls with their arguments bound; a token is one run over the list.

It is used where it is the same computation: no gradients, no hooks, no padding or documents in the token, modules of
the types below with their own weights. Everything else takes the plain step, which is its twin. It is right for as
long as modules, weights and states are those that it was written for; `Program.is_current` looks before each token.
"""

import ctypes
import weakref
from functools import partial

import torch
from torch import nn

from .activations import FUSED_ACTIVATIONS
from .discrete import DiscreteDiagonal, DiscreteDPLR, DiscreteMIMO
from .feed_forwards import S4FeedForward
from .kernels_s4 import in_force
from .mixers import S4Mixer
from .native_library import library
from .single_steps import discrete_from

ACTIVATION_NUMBERS = {"identity": 0, "gelu": 1, "silu": 2}
FEW_ROWS = 8  # above it PyTorch's matrix product is faster than rows that share the reading of a weight

_programs = weakref.WeakKeyDictionary()  # the first layer of a cache -> its Program, or None


class Unsupported(Exception):
    """A model that is not written out, with the reason."""


def run(model: nn.Module, inputs: torch.Tensor, cache) -> torch.Tensor | None:
    """One token of every row: the last hidden states (B, 1, H), and `cache` after it; None: take the plain step.

    model: an S4Model; inputs: embeddings (B, 1, H).
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_grad_enabled():
        return None
    if type(inputs) is not torch.Tensor or inputs.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return None
    if inputs.dtype not in (torch.float32, torch.bfloat16) or in_force(model.config.kernels) != "auto":
        return None
    # a state that is to be taken back needs what has driven it since
    if not all(layer.is_initialized and not layer.record_past for layer in cache.layers) or library() is None:
        return None
    first = cache.layers[0]
    program = _programs.get(first)
    if program is None or not program.is_current(model, inputs, cache):
        try:
            program = Program(model, inputs, cache)
        except Unsupported as error:
            program = NoProgram(model, str(error))
        _programs[first] = program
    return program(inputs, cache)


class NoProgram:
    """A model whose step was not written out, and why not."""

    def __init__(self, model: nn.Module, reason: str):
        self.model, self.reason = weakref.ref(model), reason

    def is_current(self, model: nn.Module, inputs: torch.Tensor, cache) -> bool:
        return self.model() is model

    def __call__(self, inputs: torch.Tensor, cache) -> None:
        return None


class Program:
    """The step of a model on one cache, for a batch of B rows.

    h (B, H): the residual stream, float32. calls: what a token runs, in order; each takes no arguments. memos: for each
    state space, what its coefficients were taken from. Everything that a call points to is kept here, so that no
    address outlives its memory.
    """

    def __init__(self, model: nn.Module, inputs: torch.Tensor, cache):
        if model.training:
            raise Unsupported("dropout")
        self.rows, self.dtype, self.threads = len(inputs), inputs.dtype, torch.get_num_threads()
        self.calls, self.kept, self.memos, self.states = [], [], [], []
        self.seen = [_Seen(module) for module in model.modules()]
        self.h = self.room(model.config.hidden_size)
        for block, layer in zip(model.layers, cache.layers, strict=True):
            for sublayer in block.sublayers:
                write = WRITERS.get(type(sublayer.inner))
                if write is None:
                    raise Unsupported(type(sublayer.inner).__name__)
                write(self, sublayer.inner, self.norm(sublayer.norm, self.h), layer)
        self.out = self.norm(model.norm, self.h)

    def is_current(self, model: nn.Module, inputs: torch.Tensor, cache) -> bool:
        """Whether modules, weights and states are still those that the calls were bound to."""
        return (
            inputs.dtype == self.dtype
            and len(inputs) == self.rows
            and torch.get_num_threads() == self.threads
            and not model.training
            and self.seen[0].module is model
            and all(cache.layers[i].states[j].data_ptr() == address for i, j, address in self.states)
            and all(discrete_from(ssm, memo) is discrete for ssm, memo, discrete in self.memos)
            and all(seen.is_same() for seen in self.seen)
        )

    def __call__(self, inputs: torch.Tensor, cache) -> torch.Tensor:
        self.h.copy_(inputs[:, 0])
        for call in self.calls:
            call()
        for layer in cache.layers:
            layer.advanced_in_place(1)
        return self.out[:, None].to(self.dtype, copy=True)

    # ---- what the writers are made of. x and y are buffers (B, width), float32

    def room(self, width: int) -> torch.Tensor:
        return torch.empty(self.rows, width)

    def call(self, name: str, *arguments) -> None:
        """A function of the library with its arguments bound: tensors as addresses, None as 0, numbers as they are."""
        bound = []
        for argument in arguments:
            if torch.is_tensor(argument):
                if not argument.is_contiguous() or argument.device.type != "cpu":
                    raise Unsupported("a tensor that does not lie in a row")
                self.kept.append(argument)
                argument = ctypes.c_void_p(argument.data_ptr())
            elif isinstance(argument, float):
                argument = ctypes.c_float(argument)
            else:
                argument = ctypes.c_int64(argument or 0)
            bound.append(argument)
        self.calls.append(partial(getattr(library(), name), *bound))

    def weight(self, tensor: torch.Tensor | None, dtype: torch.dtype | None = None) -> torch.Tensor | None:
        """A parameter's memory. Raises Unsupported for one that the library cannot read."""
        if tensor is None:
            return None
        tensor = tensor.detach()
        if type(tensor) is not torch.Tensor or not tensor.numel():
            raise Unsupported("weights that are packed or elsewhere")
        if tensor.dtype not in ((torch.float32, torch.bfloat16) if dtype is None else (dtype,)):
            raise Unsupported(f"weights of {tensor.dtype}")
        return tensor

    def norm(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if type(module) not in (nn.LayerNorm, nn.RMSNorm):
            raise Unsupported(type(module).__name__)
        weight, bias = self.weight(module.weight), self.weight(getattr(module, "bias", None))
        half = _is_half(weight, bias)
        eps = module.eps if module.eps is not None else torch.finfo(torch.float32).eps
        y = self.room(x.shape[1])
        self.call("norm", *x.shape, x, weight, bias, half, float(eps), type(module) is nn.LayerNorm, y)
        return y

    def linear(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if type(module) is not nn.Linear:
            raise Unsupported(type(module).__name__)
        return self.product(x, self.weight(module.weight), self.weight(module.bias))

    def product(self, x: torch.Tensor, W: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x W^T + bias, W (out, in)."""
        y = self.room(len(W))
        if self.rows <= FEW_ROWS:
            self.call("linear", self.rows, *W.shape, x, W, bias, _is_half(W, bias), y, self.threads)
        else:
            self.calls.append(partial(_many_rows, x, W, bias, y))
        return y

    def activate(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if type(module) not in FUSED_ACTIVATIONS:
            raise Unsupported(type(module).__name__)
        name = FUSED_ACTIVATIONS[type(module)]
        if name != "identity":
            self.call("activate", ACTIVATION_NUMBERS[name], x.numel(), x, x, self.threads)
        return x

    def state_space(self, mixer: nn.Module, x: torch.Tensor, layer) -> torch.Tensor:
        """The step of a mixer's state space, D x included; its state in the cache advances in place."""
        ssm, state, memo = mixer.ssm, layer.states[mixer.state_index], layer.get_memo(mixer.state_index)
        if state.dtype != torch.float32 or len(state) != self.rows:
            raise Unsupported(f"states of {state.dtype}")
        discrete = discrete_from(ssm, memo)
        self.memos.append((ssm, memo, discrete))
        # the cache itself is not kept: it would never be let go of
        self.states.append((mixer.layer_index, mixer.state_index, state.data_ptr()))
        D = self.weight(ssm.D, torch.float32)
        if isinstance(discrete, DiscreteDiagonal):
            y = self.room(x.shape[1])
            self.call("step_diagonal", *state.shape, x, state, discrete.Lambda_bar, discrete.row, D, y, self.threads)
        elif isinstance(discrete, DiscreteDPLR):
            y, rank = self.room(x.shape[1]), discrete.F.shape[-1]
            F, G = (part.transpose(1, 2).contiguous() for part in (discrete.F, discrete.G))
            system = (discrete.E, F, G, discrete.B_bar, discrete.C_row)
            self.call("step_dplr", *state.shape, rank, x, state, *system, D, y, self.threads)
        elif isinstance(discrete, DiscreteMIMO):
            Lambda_bar, drives, reads = discrete.coefficients()
            drive = self.product(x, drives)
            self.call("step_states", self.rows, len(Lambda_bar), drive, state, Lambda_bar)
            y = self.product(state[:, 0], reads)
            self.call("add_skip", *x.shape, x, D, y)
        else:
            raise Unsupported(type(discrete).__name__)
        return y

    def add(self, p: torch.Tensor, mode: int = 0, y: torch.Tensor | None = None) -> None:
        """h += what p (B, H or 2H) and y make of each other: see add_gated in native_source.py."""
        self.call("add_gated", mode, *self.h.shape, p, y, self.h)


def _is_half(*weights) -> bool:
    dtypes = {weight.dtype for weight in weights if weight is not None}
    if len(dtypes) > 1:
        raise Unsupported("a weight and a bias of different dtypes")
    return dtypes == {torch.bfloat16}


def _many_rows(x, W, bias, y):
    y.copy_(nn.functional.linear(x.to(W.dtype), W, bias))


class _Seen:
    """A module as it was when it was written out: its children, the memory of its parameters, no hooks."""

    def __init__(self, module: nn.Module):
        self.module, self.fields = module, module.__dict__
        self.children, self.parameters = module._modules, module._parameters
        self.hooks = module._forward_hooks, module._forward_pre_hooks
        self.facts = self._facts()
        if any(self.hooks) or "forward" in self.fields:
            raise Unsupported("hooks")

    def _facts(self):
        return (*self.children.values(), *[p if p is None else p.data_ptr() for p in self.parameters.values()])

    def is_same(self) -> bool:
        return not (self.hooks[0] or self.hooks[1] or "forward" in self.fields) and self._facts() == self.facts


# ---- the sublayers, each as in its own file


def _write_s4_mixer(program: Program, mixer: S4Mixer, x: torch.Tensor, layer) -> None:
    y = program.activate(mixer.activation, program.state_space(mixer, x, layer))
    program.add(program.linear(mixer.out_proj, y), {"none": 0, "glu": 1, "half": 2}[mixer.glu], y)


def _write_feed_forward(program: Program, inner: S4FeedForward, x: torch.Tensor, layer) -> None:
    program.add(program.linear(inner.down_proj, program.activate(inner.activation, program.linear(inner.up_proj, x))))


WRITERS = {S4Mixer: _write_s4_mixer, S4FeedForward: _write_feed_forward}
