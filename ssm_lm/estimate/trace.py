"""What a piece of the model allocates and moves, counted by running it on tensors without data.

`FakeTensorMode` carries shapes and dtypes through the real code, forward and backward, and allocates nothing: a layer
of any size is counted in a moment, and the count follows the code when that changes.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

from ..internals.torch import TorchDispatchMode, operator_name, storage_key, tree_leaves

# operators that touch no data
NO_TRAFFIC = (
    "_unsafe_view",
    "empty",
    "empty_like",
    "new_empty",
    "empty_strided",
    "new_empty_strided",
    "detach",
    "alias",
)
# operators that only write; that read of their first tensor, or change there, only what an index names
READ_BY_INDEX = ("embedding", "gather", "index_select")
FILLED = ("zeros_like", "new_zeros", "ones_like", "new_ones", "full_like", "new_full", "zero_", "fill_", "bernoulli_")
ADDED_BY_INDEX = ("scatter_", "scatter_add_", "index_add_")


class StorageCounter(TorchDispatchMode):
    """Bytes of the storages that are alive, their peak, the bytes that operators read and wrote, and how many kernels a
    GPU launches for them: one an operator, and what `kernel_launches` says.

    Every storage counts from the operator that made it to the moment nothing refers to it. What lives inside one
    operator (the workspace of a matmul or an FFT) is not seen.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = self.traffic = self.launches = self.in_kernels = 0
        self.within_kernels = self.within_ours = False
        self._known = {}

    def __enter__(self):
        _running.append(self)
        return super().__enter__()

    def __exit__(self, *exception):
        _running.pop()
        return super().__exit__(*exception)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        made = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        for tensor in made:
            self.add(tensor)
        if function.namespace == "aten" and not function.is_view and operator_name(function) not in NO_TRAFFIC:
            moved = _moved(operator_name(function), read, made)
            self.traffic += moved
            self.launches += not self.within_kernels
            self.in_kernels += moved * self.within_ours
        return result

    def add(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage, if it is not counted yet."""
        storage = tensor.untyped_storage()
        key = storage_key(storage)
        if key not in self._known:
            size = storage.nbytes()
            self._known[key] = weakref.finalize(storage, self._free, key, size)
            self.live += size
            self.peak = max(self.peak, self.live)

    def _free(self, key, size):
        self._known.pop(key, None)
        self.live -= size

    def start(self) -> int:
        """Measure the peak and the traffic from here on; returns what is alive."""
        self.peak, self.traffic, self.launches, self.in_kernels = self.live, 0, 0, 0
        return self.live


_running: list[StorageCounter] = []


@contextmanager
def kernel_launches(count: int, ours: bool = True) -> Iterator[None]:
    """Within, operators stand in for `count` launches of kernels, of our own or of PyTorch's."""
    counter = _running[-1] if _running else StorageCounter()
    counter.launches += count
    counter.within_kernels, counter.within_ours = True, ours
    try:
        yield
    finally:
        counter.within_kernels = counter.within_ours = False


def _moved(operator: str, read: list[torch.Tensor], made: list[torch.Tensor]) -> int:
    """Bytes that an operator reads and writes."""
    if operator in FILLED:  # whatever has the shape is not read
        return sum(map(_bytes, made))
    if operator in READ_BY_INDEX:
        return sum(map(_bytes, read[1:])) + 2 * sum(map(_bytes, made))
    if operator in ADDED_BY_INDEX:
        return sum(map(_bytes, read[1:])) + 2 * _bytes(read[-1])
    return sum(map(_bytes, read + made))


def _bytes(tensor: torch.Tensor) -> int:
    """An expanded tensor is read once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


class Trace(NamedTuple):
    """Bytes of one piece of the model, beyond its parameters and its input.

    kept: alive after the forward: what the backward needs, and the output. forward_peak: the most during the forward.
    backward_peak: the most during the backward, with what was kept and the output's gradient; parameter gradients are
    in it as they come. gradients: of the parameters, after the backward. forward_traffic, backward_traffic: what the
    operators read and wrote, each on its own, as PyTorch runs them without fusion, and our kernels what they ask for.
    forward_least, backward_least: what no implementation that keeps as much can do without: inputs, parameters and what
    is kept, the output's gradient, and the gradients, each read or written once.
    """

    kept: int
    forward_peak: int
    backward_peak: int
    gradients: int
    forward_traffic: int
    backward_traffic: int
    forward_launches: int
    backward_launches: int
    forward_in_kernels: int  # of the traffic, what our kernels move
    backward_in_kernels: int
    forward_least: int
    backward_least: int


def trace(module: nn.Module, inputs: list[torch.Tensor], autocast: torch.dtype | None, **kwargs) -> Trace:
    """Count `module(*inputs, **kwargs)`, forward and backward. Call it inside a FakeTensorMode that made all of them.

    autocast: the dtype of an autocast region around the forward, or None.
    """
    counter = StorageCounter()
    for tensor in [*inputs, *kwargs.values(), *module.parameters()]:
        if isinstance(tensor, torch.Tensor):
            counter.add(tensor)
    given = counter.live
    with counter:
        before = counter.start()
        with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            output = module(*inputs, **kwargs)
        kept, forward_peak, forward_traffic = counter.live - before, counter.peak - before, counter.traffic
        forward = counter.launches, counter.in_kernels
        gradient = torch.empty_like(output)
        counter.start()
        output.backward(gradient)
        backward_peak, backward_traffic = counter.peak - before, counter.traffic
        launches, in_kernels = zip(forward, (counter.launches, counter.in_kernels), strict=True)
        del output, gradient
        input_gradients = sum(x.grad.numel() * x.grad.element_size() for x in inputs if x.grad is not None)
        gradients = counter.live - before - input_gradients
    traffic = forward_traffic, backward_traffic
    # what was given and kept is read, the output's gradient in its place, and gradients are written
    least = given + kept, given + kept + input_gradients + gradients
    return Trace(kept, forward_peak, backward_peak, gradients, *traffic, *launches, *in_kernels, *least)
