"""The modes that see a whole sequence: chunk, and those that answer it at once from a zero state, fft and associative.

A layer brings its system (`operators`, `convolve`) and the way from its input to the signals that are scanned and back
(`drive`, `read`); here is how a sequence is cut, how documents are kept apart, and what an initial state adds.

Shapes: x (B, L, H) in the dtype of the execution, state (B, *layer.state_shape) or None for zero.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from .chunked import ChunkOperators
from .documents import Documents, move_apart, move_together
from .execution import Execution
from .ops import chunk_scan


class LayerScan:
    """A layer's chunk scan in one direction, as an execution says. Its states are those of `to_scan_state`."""

    def __init__(self, layer, execution: Execution, reverse: bool = False):
        self.layer, self.execution, self.reverse = layer, execution, reverse

    def answer(self, signal, state):
        """The signal's answer, with D in it where the layer can, through the kernel's activation; the final state."""
        activation = self.execution.activation or "identity"
        return self._over_any_length(signal, state, skip=not self.reverse, activation=activation)

    def emitted(self, signal, state):
        """What `state` adds to the answer of a signal like this one, by linearity: the answer to zeros; the state that
        is left of it.
        """
        return self._over_any_length(torch.zeros_like(signal), state)

    def final_state(self, signal, state):
        return self._over_any_length(signal, state, has_output=False)[1]

    def of_documents(self, signal, documents: Documents, has_output=True):
        """As `answer`, for documents that are moved apart, each from a zero state; (B, chunks * T, C)."""
        apart = move_apart(signal, documents.slot, len(signal), documents.chunks * documents.chunk_size)
        skip = has_output and not self.reverse
        return self._over_chunks(apart, documents.chunk_size, None, documents.keep, has_output=has_output, skip=skip)

    def _over_any_length(self, signal, state, **wanted):
        """Whole chunks, then what is left as one chunk of its own length. The kernel takes any length at once, in
        chunks of one size, unless it goes on from a state.
        """
        L = signal.shape[1]
        at_once = self.execution.kernel and state is None
        T = self.execution.chunk_size if at_once else min(self.execution.chunk_size, L)
        whole = L if at_once else L // T * T
        y, state = self._over_chunks(signal[:, :whole], T, state, **wanted)
        if whole < L:
            left, state = self._over_chunks(signal[:, whole:], L - whole, state, rest=True, **wanted)
            y = None if y is None else torch.cat([y, left], 1)
        return y, state

    def _over_chunks(self, signal, T, state, keep=None, skip=False, has_output=True, activation="identity", rest=False):
        longest = self.execution.chunk_size
        if T > longest:
            # chunks of documents, for a kernel of shorter ones: a state is reset at the first part of a chunk alone
            shorter = next(t for t in range(longest, 0, -1) if T % t == 0)
            if keep is not None:
                keep = F.pad(keep[..., None], (0, T // shorter - 1), value=True).flatten(1)
            T = shorter
        make = OperatorMaker(self.layer, T, self.reverse, skip)
        # a chunk that is shorter than those of the decision is a rest, whole ones before it or not
        rest = rest or (T < longest and state is not None)
        options = {"has_output": has_output, "activation": activation, "rest": rest}
        options["run_kernel"] = self.execution.kernel
        options["in_c"] = self.layer.scans_this_in_c(signal)
        if torch.compiler.is_compiling():
            return chunk_scan(signal, make(), state, keep, **options)
        names, parameters = zip(*make.named_parameters(), strict=True)

        def again(*values):
            return functional_call(make, dict(zip(names, values, strict=True)), ())

        return chunk_scan(signal, again, state, keep, parameters, **options)


class OperatorMaker(nn.Module):
    """The operators of a layer as a function of its parameters, for `chunk_scan`, which calls it once more in the
    backward, with the parameters that the forward saw. skip: with D in the first tap.
    """

    def __init__(self, layer, length: int, reverse: bool, skip: bool):
        super().__init__()
        self.layer, self.length, self.reverse, self.skip = layer, length, reverse, skip

    def forward(self) -> ChunkOperators:
        if self.skip:
            return self.layer.operators_with_skip(self.length)
        return self.layer.operators(self.length, self.reverse)


def run_chunk(layer, x, state, documents: Documents | None, execution: Execution, reverse: bool = False):
    """y with D x (forward only), the final state."""
    scan = LayerScan(layer, execution, reverse)
    signal, start = layer.drive(x), None if state is None else layer.to_scan_state(state)
    if documents is None:
        signal, final = scan.answer(signal, start)
    else:
        signal, final = scan.of_documents(signal, documents)
        signal = move_together(signal, documents.slot, len(x))
        signal, final = _continue(scan, signal, final, start, documents)
    return layer.read(signal, x, skipped=True, reverse=reverse), layer.from_scan_state(final)


def run_whole(layer, x, state, documents: Documents | None, execution: Execution, needs_state, reverse=False):
    """The same by what answers a signal (B, L, C) from a zero state at once; the final state only if it is needed."""
    answer = layer.associative_scan if execution.mode == "associative" else layer.convolve
    scan = LayerScan(layer, execution, reverse)
    signal, start = layer.drive(x), None if state is None else layer.to_scan_state(state)
    drive, final = signal, None
    if documents is None:
        signal = answer(drive, reverse)
        if start is not None:
            signal = signal + scan.emitted(drive, start)[0]
        if needs_state:
            final = scan.final_state(drive, start)
    else:
        apart = move_apart(drive, documents.row_slot, documents.rows, documents.longest)
        signal = move_together(answer(apart, reverse), documents.row_slot, len(x))
        if needs_state:
            final = scan.of_documents(drive, documents, has_output=False)[1]
        signal, final = _continue(scan, signal, final, start, documents)
    y = layer.read(signal, x, skipped=False, reverse=reverse)
    return y, None if final is None else layer.from_scan_state(final)


def _continue(scan, signal, final, start, documents):
    """Add what an initial state does to the first document of every row, which goes on from it."""
    if start is None:
        return signal, final
    emitted, left = scan.emitted(signal, start)
    signal = signal + torch.where(documents.continues[..., None], emitted, 0)
    if final is not None:
        final = final + torch.where(documents.continues[:, -1, None, None], left, 0)
    return signal, final
