"""Decoding steps of a whole model as a flat list of calls into native_library.py: on a CPU, in generate().

The plain step makes thousands of small calls a token, each of them dearer than its arithmetic. Here the sublayers have
been written out, once a cache and number of tokens, as calls with their arguments bound; a token, or a few that were
drafted, are one run over the list. So is a short prompt: the operators of a scan take longer than all of its steps.

It is used where it is the same computation: no gradients, no hooks, no documents in the tokens, modules of the types
below with their own weights. Everything else takes the plain step, which is its twin. It is right for as long as
modules, weights and states are those that it was written for: see `Program.is_current`.
"""

import contextlib
import math
import weakref
from collections import Counter, defaultdict
from functools import partial
from itertools import chain, groupby
from operator import is_
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules import module as nn_module
from torch.utils.hooks import RemovableHandle

from .activations import FUSED_ACTIVATIONS
from .cache_s4 import S4CacheLayer
from .discrete import NORM_EPSILON, DiscreteDiagonal, DiscreteDPLR, DiscreteMIMO, DiscreteSSD
from .dplr import S4
from .execution import FEW_TOKENS
from .feed_forwards import S4FeedForward, SwiGLU
from .kernels_s4 import in_force
from .losses import LanguageModelHead
from .mixers import GatedMixer, GatedProjection, H3Mixer, S4Mixer
from .native_library import address, bind, floats, for_c, library, number_of_threads
from .native_operators import may_run
from .native_systems import MOST_RANK, native_dplr_numbers
from .norms_and_dropout import LayerNorm, RMSNorm
from .single_steps import discrete_from, versions_of

ACTIVATION_NUMBERS = {"identity": 0, "gelu": 1, "silu": 2}
RECORDER = "transformers.utils.output_capturing"  # where the hooks come from that record hidden states
FROM_IDS = "ids"  # the key, beside numbers of tokens, of a program that is none of S4Model but of all; native_tokens.py
FEW_ROWS = 32  # above it PyTorch's matrix product is faster than rows that share the reading of a weight
PROMPT_ROWS = 512  # tokens of all rows together, above which a scan is about as fast for one kind and faster for others


class Unsupported(Exception):
    """A model that is not written out, with the reason."""


def run(model: nn.Module, inputs: torch.Tensor, cache, mask: torch.Tensor | None = None) -> torch.Tensor | None:
    """T tokens of every row: the last hidden states (B, T, H), and `cache` after them; None: take the plain step.

    model: an S4Model; inputs: embeddings (B, T, H). mask: (B, T), by which it is multiplied what drives a state.
    """
    if not _is_for_the_library(model.config.kernels, inputs) or inputs.shape[2] != model.config.hidden_size:
        return None
    if not all(isinstance(layer, S4CacheLayer) for layer in cache.layers):  # something that stands for one in a graph
        return None
    rows, T = inputs.shape[:2]
    if (mask is not None and mask.shape != (rows, T)) or not _goes_by_steps(model, inputs):
        return None
    if mask is None and (T == 1 or rows * T <= FEW_ROWS):
        return programs_of(model).find(T, Program, model, inputs, cache)(inputs, cache)
    # as good as never one of its length again
    parts = inputs.split(max(1, PROMPT_ROWS // rows), 1)
    programs = {}
    for part in (parts[0], parts[-1]):
        if part.shape not in programs:
            programs[part.shape] = program = programs_of(model).write(Program, model, part, cache, mask is not None)
            if isinstance(program, NoProgram):
                return None
    masks = [None] * len(parts) if mask is None else mask.split(parts[0].shape[1], 1)
    outputs = [programs[part.shape](part, cache, by) for part, by in zip(parts, masks, strict=True)]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)


def _goes_by_steps(model: nn.Module, inputs: torch.Tensor) -> bool:
    """Few tokens, a short prompt, or one whose products PyTorch is slow at, where no mixer was told another mode."""
    if inputs.shape[1] <= FEW_TOKENS:
        return True
    is_long = inputs.shape[:2].numel() > PROMPT_ROWS
    if is_long and not (inputs.dtype == torch.bfloat16 and most_rows(True) == math.inf):
        return False
    inner = (sublayer.inner for block in model.layers for sublayer in block.sublayers)
    return all(getattr(module, "mode", "auto") in ("auto", "recurrent") for module in inner)


def logits(model: nn.Module, head: nn.Module, hidden_states: torch.Tensor, cache) -> torch.Tensor | None:
    """The logits (B, T, V) of a linear head for what `run` has returned; None: call the head.

    A product of one row with a large table is bound by memory, which PyTorch's leaves half unused on few threads.
    """
    if cache is None or not _is_for_the_library(model.config.kernels, hidden_states):
        return None
    program = program_of(model, cache, hidden_states.shape[1])
    return None if program is None else program.logits(head, hidden_states, programs_of(model).look())


def program_of(model: nn.Module, cache, tokens: int) -> "Program | None":
    """What so many tokens of a cache, or of None, last ran as, where they were written out; model: an S4Model."""
    layers = getattr(cache, "layers", ())
    of_cache = programs_of(model).by_cache.get(layers[0], {}) if layers else {}
    program = of_cache.get(tokens)
    if program is None and tokens == 1:
        program = of_cache.get(FROM_IDS)
    return program if isinstance(program, Program) else None


def _is_for_the_library(kernels: str, x: torch.Tensor) -> bool:
    """Whether the library may read x (B, T, ...); kernels: the config's key."""
    # first, for a graph that asked for the length would be one of its length
    if not is_time_for_the_library(kernels):
        return False
    if x.dim() != 3 or not x.shape[:2].numel():
        return False
    return type(x) is torch.Tensor and x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)


def most_rows(half: bool) -> float:
    """Up to how many rows the library's product is faster than PyTorch's, which takes three times as long in bfloat16
    where it multiplies in float32. half: the weights are bfloat16.
    """
    return math.inf if half and not library().multiplies_half() else FEW_ROWS


def is_time_for_the_library(kernels: str) -> bool:
    """Whether the library may stand for PyTorch now, whatever the tensors; kernels: the config's key.

    Beside what `may_run` asks, not where something looks on: gradients, modes that count or replace operations, hooks
    on all modules.
    """
    if not may_run((), kernels) or torch.is_grad_enabled():
        return False
    if torch._C._len_torch_dispatch_stack() or all_have_hooks():
        return False
    return not torch.is_autocast_enabled("cpu") and library() is not None


def all_have_hooks() -> bool:
    """Whether there is a hook for every module of the process, which would wait for this one's."""
    return bool(nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks)


class Columns(NamedTuple):
    """Some columns of a buffer, whose rows a function is told to be apart."""

    of: torch.Tensor


class Programs:
    """What a model keeps of its caches: {number of tokens: Program} for each that is alive. A copy of the model, or one
    that is read from a file, begins anew.

    Whether a model is still the one that was written out takes a look at hundreds of modules, none of which is near
    after the weights have gone through the processor: a fifth of a small model's step. Where the caller says that
    nobody changes it, as generate() does, one look serves all tokens, unless a hook has been registered anywhere since.
    """

    def __init__(self):
        self.by_cache = weakref.WeakKeyDictionary()
        self.begun = self.running = 0

    def of(self, cache) -> dict:
        return self.by_cache.setdefault(cache.layers[0], {})

    def find(self, key, kind: type["Program"], model: nn.Module, inputs: torch.Tensor, cache) -> "Program | NoProgram":
        """What stands under `key` of a cache, written anew as a `kind` and kept where it is no longer current."""
        of_cache = self.of(cache)
        program = of_cache.get(key)
        if program is None or not program.is_current(model, inputs, cache, self.look()):
            program = of_cache[key] = self.write(kind, model, inputs, cache)
        return program

    def write(
        self, kind: type["Program"], model: nn.Module, inputs: torch.Tensor, cache, masked: bool = False
    ) -> "Program | NoProgram":
        """A new `kind`. A cache without states gets zeros, and loses them where the model is not written out."""
        empty = [layer for layer in cache.layers if not layer.is_initialized]
        try:
            return kind(model, inputs, cache, self.look(), masked)
        except Unsupported as error:
            for layer in empty:
                layer.forget_states()
            return NoProgram(str(error))

    @contextlib.contextmanager
    def unchanged(self):
        """Within it nobody changes the model, but for hooks."""
        self.begun, self.running = self.begun + 1, self.running + 1
        try:
            yield
        finally:
            self.running -= 1

    def look(self) -> tuple | None:
        """What names a look that still holds, or None: look again."""
        return (self.begun, RemovableHandle.next_id) if self.running else None

    def __deepcopy__(self, memo):
        return Programs()

    def __reduce__(self):
        return Programs, ()


def programs_of(model: nn.Module) -> Programs:
    """Of an S4Model, made when they are first asked for."""
    attributes = vars(model)
    if "_programs" not in attributes:
        attributes["_programs"] = Programs()
    return attributes["_programs"]


class NoProgram:
    """A model whose step was not written out, and why not."""

    def __init__(self, reason: str):
        self.reason = reason

    def is_current(self, *_) -> bool:
        return True

    def __call__(self, inputs: torch.Tensor, cache) -> None:
        return None


class Program:
    """T steps of a model on one cache, for a batch of B rows.

    h (B T, H): the residual stream, float32. mask: None, or for every row of it whether it drives the states, 0 or 1.
    listed: what runs, in order, names and arguments of the library's functions or what Python calls; runs: the same, as
    many of the library's at once as follow one another. discretized: the parameters of the state spaces, from which
    coefficients were made; versions: how often they had been written to. states: where each state lies, what drives it
    and through which module, for a cache that records its past. memos: the layers', which a compiled step reads from
    after a prompt that was stepped here, and which a reset empties.
    Everything that a call points to is kept here, so that no address outlives its memory.
    """

    def __init__(self, model: nn.Module, inputs: torch.Tensor, cache, look: tuple | None, masked: bool = False):
        if model.training:
            raise Unsupported("dropout")
        self.shape, self.dtype, self.threads = inputs.shape[:2], inputs.dtype, number_of_threads()
        self.rows = self.shape.numel()
        self.listed, self.kept, self.discretized, self.states = [], [], [], []
        self.seen, self.looked, self.head = _Seen(model), look, None
        self.rooms = _Rooms(self.rows, shared=self.shape[1] > 1 and self.rows > FEW_ROWS)
        self.mask = self.rooms.own(1) if masked else None
        self.h = self.rooms.own(model.config.hidden_size)
        self.write(model, cache)
        self.memos = [layer.memos for layer in cache.layers]
        self.versions, self.runs = versions_of(self.discretized), []
        for is_of_python, group in groupby(self.listed, callable):
            calls = list(group)
            self.runs += calls if is_of_python else [bind(calls, self.threads)]

    def write(self, model: nn.Module, cache) -> None:
        """From embeddings in h to the last hidden states in out."""
        for block, layer in zip(model.layers, cache.layers, strict=True):
            for sublayer in block.sublayers:
                write = WRITERS.get(type(sublayer.inner))
                if write is None:
                    raise Unsupported(type(sublayer.inner).__name__)
                self.rooms.next_sublayer()
                write(self, sublayer.inner, self.norm(sublayer.norm, self.h), layer)
        self.rooms.next_sublayer()
        self.out = self.norm(model.norm, self.h)

    def is_current(self, model: nn.Module, inputs: torch.Tensor, cache, look: tuple | None) -> bool:
        """Whether modules, weights and states are still those that the calls were bound to. look: see Programs."""
        if not (
            inputs.dtype == self.dtype
            and inputs.shape[:2] == self.shape
            and number_of_threads() == self.threads
            and not model.training
            and all(cache.layers[i].states[j].data_ptr() == address for i, j, address, *_ in self.states)
            and versions_of(self.discretized) == self.versions
            and all(map(is_, (layer.memos for layer in cache.layers), self.memos))
        ):
            return False
        if look is None or look != self.looked:
            if not self.seen.is_same(model):
                return False
            self.looked = look
        return True

    def __call__(self, inputs: torch.Tensor, cache, mask: torch.Tensor | None = None) -> torch.Tensor:
        self.h.copy_(inputs.flatten(0, 1))
        if mask is not None:
            self.mask.copy_(mask.reshape(-1, 1))
        self.advance(cache)
        return self.out.view(*self.shape, -1).to(self.dtype, copy=True)

    def advance(self, cache) -> None:
        """Run the calls, and tell the cache."""
        recorded = any(layer.record_past for layer in cache.layers)
        if recorded:
            for i, j, *_ in self.states:
                cache.layers[i].before_update(j)
        for run in self.runs:
            run()
        if recorded:
            for i, j, _, module, x in self.states:
                # a copy, for the next token writes over x
                cache.layers[i].after_update(j, self.shape[1], module, x.view(*self.shape, -1).clone())
        else:
            for layer in cache.layers:
                layer.after_update(0, self.shape[1])

    def logits(self, head: nn.Module, hidden_states: torch.Tensor, look: tuple | None) -> torch.Tensor | None:
        """See `logits` above. What the head is, is looked at as often as what the model is; look: see Programs."""
        rows, width = hidden_states.shape[:2].numel(), hidden_states.shape[2]
        if rows > min(PROMPT_ROWS, most_rows(hidden_states.dtype == torch.bfloat16)):
            return None
        key = head, look, hidden_states.dtype
        if self.head is None or look is None or self.head[:3] != key:
            self.head = *key, weight_of_head(head, width, hidden_states.dtype)
        weight = self.head[3]
        if weight is None:
            return None
        x, y = hidden_states.to(torch.float32).contiguous(), floats(*hidden_states.shape[:2], len(weight))
        arguments = rows, *weight.shape, x, weight, None, _is_half(weight), y, number_of_threads()
        library().product(*map(for_c, arguments))
        return y.to(weight.dtype)

    # ---- what the writers are made of. x and y are buffers (B T, width), float32

    def room(self, width: int) -> torch.Tensor:
        return self.rooms.take(width)

    def call(self, name: str, *arguments) -> None:
        """A function of the library and its arguments: tensors as addresses, None as 0, numbers as they are."""
        for argument in arguments:
            if torch.is_tensor(argument):
                if not argument.is_contiguous() or argument.device.type != "cpu":
                    raise Unsupported("a tensor that does not lie in a row")
                self.kept.append(argument)
            elif isinstance(argument, Columns):
                self.kept.append(argument.of)
        self.listed.append((name, tuple(map(_for_c, arguments))))

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
        if type(module) not in (nn.LayerNorm, LayerNorm, RMSNorm):
            raise Unsupported(type(module).__name__)
        weight, bias = self.weight(module.weight), self.weight(getattr(module, "bias", None))
        half = _is_half(weight, bias)
        eps = module.eps if module.eps is not None else torch.finfo(torch.float32).eps
        y = self.room(x.shape[1])
        self.call("norm", *x.shape, x, weight, bias, half, float(eps), isinstance(module, nn.LayerNorm), y)
        return y

    def linear(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if type(module) not in (nn.Linear, GatedProjection):
            raise Unsupported(type(module).__name__)
        return self.product(x, self.weight(module.weight), self.weight(module.bias))

    def product(self, x: torch.Tensor, W: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x W^T + bias, W (out, in)."""
        y, half = self.room(len(W)), _is_half(W, bias)
        if self.rows <= most_rows(half):
            self.call("linear", self.rows, *W.shape, x, W, bias, half, y)
        else:
            self.listed.append(partial(_many_rows, x, W, bias, y))
        return y

    def activate(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if type(module) not in FUSED_ACTIVATIONS:
            raise Unsupported(type(module).__name__)
        name = FUSED_ACTIVATIONS[type(module)]
        if name != "identity":
            self.call("activate", ACTIVATION_NUMBERS[name], x.numel(), x, x)
        return x

    def state(self, mixer: nn.Module, index: int, module: nn.Module, x: torch.Tensor, layer) -> torch.Tensor:
        """A state of a mixer in the cache, which `x` drives through `module`, and which is to advance in place."""
        if in_force(getattr(module, "kernels", "auto")) != "auto":
            raise Unsupported("a module whose kernels were chosen for it alone")
        if index == len(layer.states):
            layer.lazy_initialization(module.zero_state(self.shape[0]))
        state = layer.states[index]
        if state.dtype != torch.float32 or state.shape != (self.shape[0], *module.zero_state(0).shape[1:]):
            raise Unsupported(f"states {tuple(state.shape)} of {state.dtype}")
        if self.rooms.shared and layer.record_past:  # it is needed when all has run
            x, driven = self.rooms.own(x.shape[1]), x
            self.listed.append(partial(x.copy_, driven))
        # the cache itself is not kept: it would never be let go of
        self.states.append((mixer.layer_index, index, state.data_ptr(), module, x))
        return state

    def state_space(self, mixer: nn.Module, x: torch.Tensor, layer) -> torch.Tensor:
        """The steps of a mixer's state space, D x included."""
        ssm = mixer.ssm
        state, memo = self.state(mixer, mixer.state_index, ssm, x, layer), layer.get_memo(mixer.state_index)
        discrete = discrete_from(ssm, memo)
        self.discretized += ssm.parameters()
        D, sizes = self.weight(ssm.D, torch.float32), (*self.shape, *state.shape[1:])
        if isinstance(discrete, DiscreteDiagonal):
            y = self.room(x.shape[1])
            self.call("step_diagonal", *sizes, x, state, discrete.Lambda_bar, discrete.row, D, y)
        elif isinstance(discrete, DiscreteDPLR) and discrete.F.shape[-1] <= 4:
            y = self._dplr(ssm, discrete, memo, x, state, D)
        elif isinstance(discrete, DiscreteMIMO):
            Lambda_bar, drives, reads = discrete.coefficients()
            states = self.product(x, drives)
            self.call("step_states", *self.shape, len(Lambda_bar), states, state, Lambda_bar)
            y = self.product(states, reads)
            self.call("add_skip", *x.shape, x, D, y)
        elif isinstance(discrete, DiscreteSSD):
            y = self._ssd(discrete, x, state, D)
        else:
            raise Unsupported(type(discrete).__name__)
        return y

    def _dplr(self, ssm, system: DiscreteDPLR, memo, x, state, D) -> torch.Tensor:
        y, (rows, T), (H, N, rank) = self.room(x.shape[1]), self.shape, system.F.shape
        # of one row a step is bound by reading its system, which several rows share
        if rows == 1 and type(ssm) is S4 and rank <= MOST_RANK and library("systems") is not None:
            P, B = self.weight(ssm.P, torch.float32), self.weight(ssm.B, torch.float32)
            if memo.numbers is None:
                memo.numbers = native_dplr_numbers(ssm.log_dt, ssm.Lambda_log_re, ssm.Lambda_im, P, B)
            given = system.E, P, B, memo.numbers, system.C_row
            self.call("step_dplr_shared", len(B), T, H, N, rank, x, state, *given, D, y)
        else:
            F, G = (part.transpose(1, 2).contiguous() for part in (system.F, system.G))
            given = system.E, F, G, system.B_bar, system.C_row
            self.call("step_dplr", rows, T, H, N, rank, x, state, *given, D, y)
        return y

    def _ssd(self, system: DiscreteSSD, x, state, D) -> torch.Tensor:
        E, N = len(system.dt), state.shape[2]
        y, bc, room = self.room(state.shape[1]), self.room(2 * N), floats(self.shape[0], E, N)
        sizes = (*self.shape, E, state.shape[1] // E, N)
        rates = system.dt, system.decay, system.omega.contiguous(), system.inverse
        normed = system.scale, system.bias, NORM_EPSILON
        self.call("step_ssd", *sizes, x, state, system.Lambda_bar, *rates, *normed, D, bc, room, y)
        return y

    def convolve(self, mixer: nn.Module, x: torch.Tensor, y: torch.Tensor, layer, activation: str = "identity") -> None:
        """The first columns of y: those of x, as many as the mixer's convolution has channels, through it and f."""
        conv = mixer.conv
        inputs = x[:, : conv.channels]
        tail = self.state(mixer, mixer.tail_index, conv, inputs, layer)
        weight, bias = self.weight(conv.weight), self.weight(conv.bias)
        sizes = (*self.shape, conv.channels, conv.size)
        lies = (Columns(inputs), x.stride(0), tail, weight, bias, _is_half(weight, bias), y, y.stride(0))
        self.call("convolve", ACTIVATION_NUMBERS[activation], *sizes, *lies)

    def masked(self, x: torch.Tensor) -> torch.Tensor:
        if self.mask is not None:
            self.call("mask", *x.shape, x, self.mask)
        return x

    def multiply(self, a: torch.Tensor, b: torch.Tensor, activation: str = "identity") -> torch.Tensor:
        """f(a) b, of columns of buffers."""
        y = self.room(a.shape[1])
        number = ACTIVATION_NUMBERS[activation]
        apart = [Columns(part) for part in (a, b)]
        self.call("multiply", number, *a.shape, apart[0], a.stride(0), apart[1], b.stride(0), y, y.stride(0))
        return y

    def add(self, p: torch.Tensor, mode: int = 0, y: torch.Tensor | None = None) -> None:
        """h += what p (B, H or 2H) and y make of each other: see add_gated in native_layers_source.py."""
        self.call("add_gated", mode, *self.h.shape, p, y, self.h)


def weight_of_head(head: nn.Module, width: int, dtype: torch.dtype) -> torch.Tensor | None:
    """The memory of a linear head's weight (V, width), None where the library cannot stand for the head."""
    if type(head) is not LanguageModelHead or head.bias is not None or has_hooks(vars(head)):
        return None
    weight = head.weight.detach()
    if type(weight) is not torch.Tensor or weight.dtype != dtype or not weight.is_contiguous():
        return None
    return weight if weight.shape[1:] == (width,) else None  # an engine may hold it elsewhere


def _for_c(argument):
    """An argument as the library takes it; see Program.call."""
    if isinstance(argument, Columns):
        return address(argument.of)
    return address(argument) if argument is None or torch.is_tensor(argument) else argument


def _is_half(*weights) -> bool:
    dtypes = {weight.dtype for weight in weights if weight is not None}
    if len(dtypes) > 1:
        raise Unsupported("a weight and a bias of different dtypes")
    return dtypes == {torch.bfloat16}


def _many_rows(x, W, bias, y):
    y.copy_(nn.functional.linear(x.to(W.dtype), W, bias))


class _Rooms:
    """Memory for what the sublayers compute, (rows, width) each; shared: all of them in that of one."""

    def __init__(self, rows: int, shared: bool):
        self.rows, self.shared = rows, shared
        self.by_width, self.taken = defaultdict(list), Counter()

    def next_sublayer(self) -> None:
        if self.shared:
            self.taken.clear()

    def take(self, width: int) -> torch.Tensor:
        found, number = self.by_width[width], self.taken[width]
        if number == len(found):
            found.append(self.own(width))
        self.taken[width] += 1
        return found[number]

    def own(self, width: int) -> torch.Tensor:
        """Memory that nothing else is computed in."""
        # a tensor of torch.inference_mode could not be written to after it, where the text may go on
        with torch.inference_mode(False):
            return floats(self.rows, width)


class _Seen:
    """A model as it was when it was written out: no hooks, its modules, the memory of its parameters. `is_same` looks
    at all of them, in few passes, most of them loops of C.

    The model itself is not kept, nor the S4Model in one with a head, for that keeps its programs, and there is to be no
    circle; the other modules are, so that none comes to lie where another lay.
    """

    def __init__(self, model: nn.Module):
        outer = _outer(model)
        self.inner = [module for module in model.modules() if module not in outer]
        self.facts = self._facts(model)
        if self.facts is None:
            raise Unsupported("hooks")

    def is_same(self, model: nn.Module) -> bool:
        return self._facts(model) == self.facts

    def _facts(self, model: nn.Module) -> tuple[list[int], list[int]] | None:
        known = [*map(vars, _outer(model)), *map(vars, self.inner)]
        if any(map(has_hooks, known)):
            return None
        modules = chain.from_iterable(d["_modules"].values() for d in known)
        parameters = chain.from_iterable(d["_parameters"].values() for d in known)
        return list(map(id, modules)), [0 if p is None else p.data_ptr() for p in parameters]


def _outer(model: nn.Module) -> list[nn.Module]:
    """The S4Model, after the one with a head that `model` may be."""
    backbone = model._modules.get("model")
    return [model] if backbone is None else [model, backbone]


def has_hooks(attributes: dict) -> bool:
    """Whether a module of these attributes does other things than its class. Hooks of transformers that record hidden
    states stay on a model that was once asked for them; where nobody asks they do nothing.
    """
    hooks = attributes["_forward_hooks"]
    if hooks and any(getattr(hook, "__module__", None) != RECORDER for hook in hooks.values()):
        return True
    return bool(attributes["_forward_pre_hooks"] or "forward" in attributes)


# ---- the sublayers, each as in its own file


def _write_s4_mixer(program: Program, mixer: S4Mixer, x: torch.Tensor, layer) -> None:
    y = program.activate(mixer.activation, program.state_space(mixer, program.masked(x), layer))
    program.add(program.linear(mixer.out_proj, y), {"none": 0, "glu": 1, "half": 2}[mixer.glu], y)


def _write_feed_forward(program: Program, inner: S4FeedForward, x: torch.Tensor, layer) -> None:
    program.add(program.linear(inner.down_proj, program.activate(inner.activation, program.linear(inner.up_proj, x))))


def _write_swiglu(program: Program, inner: SwiGLU, x: torch.Tensor, layer) -> None:
    gate, up = program.linear(inner.gate_proj, x), program.linear(inner.up_proj, x)
    program.add(program.linear(inner.down_proj, program.multiply(gate, up, "silu")))


def _write_h3(program: Program, mixer: H3Mixer, x: torch.Tensor, layer) -> None:
    if mixer.head_dim > 1:
        raise Unsupported("outer products of h3's heads")
    qkv = program.room(mixer.conv.channels)
    program.convolve(mixer, program.linear(mixer.in_proj, program.masked(x)), qkv, layer)
    q, k, v = qkv.chunk(3, -1)
    y = program.state_space(mixer, program.masked(program.multiply(k, v)), layer)
    program.add(program.linear(mixer.out_proj, program.multiply(q, y)))


def _write_gated(program: Program, mixer: GatedMixer, x: torch.Tensor, layer) -> None:
    both = program.linear(mixer.in_proj, program.masked(x))
    channels, width = mixer.conv.channels, mixer.ssm.input_size
    u, gate = program.room(width), both[:, width:]
    program.convolve(mixer, both, u, layer, "silu")
    if channels < width:
        program.listed.append(partial(u[:, channels:].copy_, both[:, channels:width]))
    y = program.multiply(gate, program.state_space(mixer, program.masked(u), layer), "silu")
    program.add(program.linear(mixer.out_proj, program.norm(mixer.norm, y)))


WRITERS = {
    S4Mixer: _write_s4_mixer,
    H3Mixer: _write_h3,
    GatedMixer: _write_gated,
    S4FeedForward: _write_feed_forward,
    SwiGLU: _write_swiglu,
}
