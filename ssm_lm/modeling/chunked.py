"""The chunk scan: any linear time-invariant state space over a sequence, in O(L), as matmuls.

Shapes: B batch, L length, H channels, N real states a channel, T tokens a chunk, p real numbers a token and channel:
1 where a channel is a real signal (S4, S4D), 2 where it is a complex one, as [real | imaginary] (a state of S5).
Everything runs in the dtype of the operators, float32 or float64. The sequence may be bfloat16 beside float32: then y
is, and so are the states that the backward reads. The Triton kernels of it are triton_chunk_scan.py.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .activations import ACTIVATIONS
from .first_order import first_order
from .kernel_launch import device_kind
from .real_form import apply_diagonal


class ChunkOperators(NamedTuple):
    """What a chunk of T tokens does to its input u and to the state h at its start:

        y_chunk = toeplitz(taps) u_chunk + emit h
        h_next  = inject u_chunk         + carry h

    taps (H, T), or (H, 2, T) for complex signals; emit (H, p T, N); inject (H, N, p T); carry is A-bar^T: dense
    (H, N, N), or diagonal and complex (H, N) as [real | imaginary]. A skip D u is D added to the first tap.
    """

    taps: torch.Tensor
    emit: torch.Tensor
    inject: torch.Tensor
    carry: torch.Tensor


def with_skip(taps: torch.Tensor, skip: torch.Tensor | None) -> torch.Tensor:
    """Taps (H, T) with a skip (H,) in the first of them; None: as they are."""
    return taps if skip is None else torch.cat([taps[:, :1] + skip[:, None], taps[:, 1:]], 1)


def operator_shapes(H: int, T: int, N: int, dense: bool) -> tuple[tuple[int, ...], ...]:
    """Of the four operators of a chunk of real signals."""
    return (H, T), (H, T, N), (H, N, T), (H, N, N) if dense else (H, N)


def toeplitz(taps: torch.Tensor) -> torch.Tensor:
    """taps (H, T) -> (H, T, T) lower triangular, entry [i, j] = taps[i - j]: the causal convolution within a chunk.

    Complex taps (H, 2, T) -> (H, 2T, 2T), the complex product in real form on [real parts | imaginary parts].
    """
    if taps.dim() == 3:
        re, im = toeplitz(taps[:, 0]), toeplitz(taps[:, 1])
        return torch.cat([torch.cat([re, -im], -1), torch.cat([im, re], -1)], -2)
    length = taps.shape[-1]
    windows = F.pad(taps, (length - 1, 0)).unfold(-1, length, 1)  # [i, m] = taps[i + m - (T-1)]
    return windows.flip(-1)


def toeplitz_adjoint(gradient: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
    """The gradient of the taps, shaped as they are, from that of `toeplitz(taps)`: sums along the diagonals."""
    T = taps.shape[-1]
    if taps.dim() == 3:
        re = toeplitz_adjoint(gradient[:, :T, :T] + gradient[:, T:, T:], taps[:, 0])
        im = toeplitz_adjoint(gradient[:, T:, :T] - gradient[:, :T, T:], taps[:, 1])
        return torch.stack([re, im], 1)
    # rows of 2T read as rows of 2T - 1: every row moves by one against the last, and diagonals become columns
    skewed = F.pad(gradient.flip(-1), (0, T)).flatten(1)[:, T - 1 : T - 1 + T * (2 * T - 1)]
    return skewed.view(-1, T, 2 * T - 1)[..., :T].sum(1)


def operator_gradients(gram: torch.Tensor, of_taps: torch.Tensor, carry: torch.Tensor) -> ChunkOperators:
    """The gradients of the four operators from the sums over chunks of [grad_y | driven]^T [u | starts]; of_taps: those
    of the taps, `toeplitz_adjoint` of the first T rows and columns.
    """
    T = of_taps.shape[-1]
    return ChunkOperators(of_taps, gram[:, :T, T:], gram[:, T:, :T], carry_gradient(gram[:, T:, T:], carry))


def carry_gradient(of_states: torch.Tensor, carry: torch.Tensor) -> torch.Tensor:
    """That of the carry, from the sums over chunks of driven^T starts, (H, N, N)."""
    if carry.dim() == 3:
        return of_states
    half = carry.shape[-1] // 2  # of the complex product: conj(start) driven
    rr, ri, ir, ii = (
        of_states[:, a : a + half, b : b + half].diagonal(dim1=1, dim2=2) for a in (0, half) for b in (0, half)
    )
    return torch.cat([rr + ii, ir - ri], -1)


# tokens x channels x batch that are cut into chunks at a time; what is cut is a copy in another order, so this bounds
# the memory beyond input, output and the chunks' states, and keeps the copies of a CPU in its cache
SEGMENT_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 27}


class _Layout(NamedTuple):
    """How a sequence (B, L, p H) is cut: into chunks of T, `segment` of them at a time."""

    B: int
    chunks: int
    T: int
    parts: int
    H: int
    segment: int

    def segments(self) -> list[tuple[int, int]]:
        return [(c, min(c + self.segment, self.chunks)) for c in range(0, self.chunks, self.segment)]

    def cut(self, sequence: torch.Tensor, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        """Chunks start..stop of (B, L, p H) as (H, chunks * B, p T), in `dtype`: a row a chunk."""
        if _turns_by_batch(sequence):
            rows = sequence.new_empty(self.H, stop - start, self.B, self.parts, self.T, dtype=dtype)
            for b in range(self.B):
                turned = sequence[b, start * self.T : stop * self.T].t().contiguous()
                rows[:, :, b] = turned.view(self.parts, self.H, stop - start, self.T).permute(1, 2, 0, 3)
            return rows.view(self.H, (stop - start) * self.B, self.parts * self.T)
        x = sequence.view(self.B, self.chunks, self.T, self.parts, self.H)[:, start:stop]
        return x.permute(4, 1, 0, 3, 2).reshape(self.H, (stop - start) * self.B, self.parts * self.T).to(dtype)

    def paste(self, sequence: torch.Tensor, start: int, stop: int, rows: torch.Tensor) -> None:
        """The inverse of `cut`, into `sequence`, which is contiguous."""
        rows = rows.view(self.H, stop - start, self.B, self.parts, self.T)
        if _turns_by_batch(sequence):
            for b in range(self.B):
                turned = rows[:, :, b].permute(2, 0, 1, 3).reshape(self.parts * self.H, -1).to(sequence.dtype)
                sequence[b, start * self.T : stop * self.T].copy_(turned.t())
            return
        x = sequence.view(self.B, self.chunks, self.T, self.parts, self.H)[:, start:stop]
        x.copy_(rows.permute(2, 1, 4, 3, 0))


def _turns_by_batch(sequence: torch.Tensor) -> bool:
    """Whether time and channels change places by one matrix for each batch element: PyTorch turns a matrix in blocks
    on a CPU, three to five times as fast as it copies permuted tensors. Compiled graphs stay without the loop.
    """
    return sequence.device.type == "cpu" and not torch.compiler.is_compiling()


def _layout(u: torch.Tensor, taps: torch.Tensor) -> _Layout:
    B, L, channels = u.shape
    T, parts = taps.shape[-1], taps.dim() - 1
    if torch.compiler.is_exporting():  # for any batch, which may not be asked for: all at a time
        return _Layout(B, L // T, T, parts, channels // parts, L // T)
    chunk_elements = max(1, B * T * channels)
    segment = max(1, SEGMENT_ELEMENTS.get(device_kind(u.device), SEGMENT_ELEMENTS["cuda"]) // chunk_elements)
    return _Layout(B, L // T, T, parts, channels // parts, segment)


class Wanted(NamedTuple):
    """What is asked of a scan beside its final state.

    keep: (B, chunks) bool; where it is False, the chunk starts from a zero state: a new document. None: it never is.
    has_output: whether y is wanted. activation: what y goes through, one of ACTIVATIONS. rest: the chunk is what whole
    ones have left of a sequence, of any length; a kernel is compiled once for all of these. in_rows: the sequence is a
    view of (H, B, L), and its gradient may be one.
    """

    keep: torch.Tensor | None = None
    has_output: bool = True
    activation: str = "identity"
    rest: bool = False
    in_rows: bool = False


class Saved(NamedTuple):
    """What the backward of a scan reads: the sequence as it was scanned, the states at the chunks' starts, and y before
    its activation (None where there is none). Each implementation has an order of memory of its own for them.
    """

    sequence: torch.Tensor
    starts: torch.Tensor
    before: torch.Tensor | None


class Implementation(NamedTuple):
    """The functions that make a chunk scan: in plain PyTorch, PLAIN, or by the kernels of triton_chunk_scan.py.

    forward(u, operators, initial_state, wanted, save) -> y, final state, Saved
    backward(saved, operators, wanted, grad_y, grad_final, L) -> gradients of u, initial state, operators
    to_rows((B, L, H)) -> (H, B, L), contiguous; without a copy of what is a view of rows

    save: whether a backward is to come. L: of u. grad_y or grad_final may be None.
    """

    forward: Callable
    backward: Callable
    to_rows: Callable


def forward(u, operators: ChunkOperators, initial_state, wanted: Wanted, save: bool):
    """See `Implementation`; y (B, L, H), the final state (B, H, N)."""
    taps, emit, inject, carry = operators
    layout = _layout(u, taps)
    dense = carry.dim() == 3
    H, B, N = layout.H, layout.B, inject.shape[1]
    carry_t = carry.transpose(-1, -2) if dense else carry.unsqueeze(1)
    inject_t, emit_t, within_t = (x.transpose(1, 2) for x in (inject, emit, toeplitz(taps)))
    lower = u.dtype != taps.dtype
    starts = taps.new_empty(H, layout.segment if lower or not save else layout.chunks, B, N)
    saved = u.new_empty(H, layout.chunks, B, N) if save and lower else starts
    state = taps.new_zeros(H, B, N) if initial_state is None else initial_state.transpose(0, 1)
    y = torch.empty_like(u, memory_format=torch.contiguous_format) if wanted.has_output else None
    u = u.contiguous()
    for start, stop in layout.segments():
        rows = layout.cut(u, start, stop, taps.dtype)
        driven = (rows @ inject_t).view(H, stop - start, B, N)
        at = starts[:, start:stop] if saved is starts and save else starts[:, : stop - start]
        for c in range(start, stop):
            if wanted.keep is not None:
                state = torch.where(wanted.keep[:, c, None], state, 0)
            at[:, c - start] = state
            if dense:
                state = torch.baddbmm(driven[:, c - start], state, carry_t)
            else:
                state = apply_diagonal(carry_t, state) + driven[:, c - start]
        if saved is not starts:
            saved[:, start:stop] = at
        if wanted.has_output:
            out = rows @ within_t
            out.baddbmm_(at.reshape(H, -1, N), emit_t)
            layout.paste(y, start, stop, out)
    state = state.transpose(0, 1)
    if not wanted.has_output or wanted.activation == "identity":
        return y, state, Saved(u, saved, None)
    return ACTIVATIONS[wanted.activation].function(y), state, Saved(u, saved, y)


def backward(saved: Saved, operators: ChunkOperators, wanted: Wanted, grad_y, grad_final, length: int):
    """See `Implementation`. It is the same scan, transposed and run in reverse. With h_c the state at the start of
    chunk c and g_c the gradient that reaches it,

        g_c = emit^T grad y_c + carry^T g_{c+1},     grad u_c = toeplitz^T grad y_c + inject^T g_{c+1}

    and the operators' gradients are sums of outer products over the chunks. Left to autograd, the slices of a loop
    over chunks would each write a full-size zero gradient: quadratic in the length.
    """
    u, starts, before = saved
    taps, emit, inject, carry = operators
    if grad_y is not None:
        grad_y = ACTIVATIONS[wanted.activation].backward(grad_y, before)
    layout, within = _layout(u, taps), toeplitz(taps)
    dense = carry.dim() == 3
    H, B, N = layout.H, layout.B, inject.shape[1]
    if not dense:
        re, im = carry.unsqueeze(1).chunk(2, -1)
        conjugate = torch.cat([re, -im], -1)
    g = taps.new_zeros(H, B, N) if grad_final is None else grad_final.transpose(0, 1)
    grad_u = torch.empty_like(u)
    grad_y = None if grad_y is None else grad_y.contiguous()
    grad_within, grad_emit, grad_inject, grad_carry = (
        torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (within, emit, inject, carry)
    )
    for start, stop in reversed(layout.segments()):
        rows = layout.cut(u, start, stop, taps.dtype)
        states = starts[:, start:stop].reshape(H, -1, N).to(taps.dtype)
        driven = taps.new_empty(H, stop - start, B, N)  # the gradient of inject u_c
        if grad_y is not None:
            grad_rows = layout.cut(grad_y, start, stop, taps.dtype)
            emitted = (grad_rows @ emit).view(H, stop - start, B, N)
        for c in range(stop - 1, start - 1, -1):
            driven[:, c - start] = g
            g = g @ carry if dense else apply_diagonal(conjugate, g)
            if grad_y is not None:
                g = g + emitted[:, c - start]
            if wanted.keep is not None:
                g = torch.where(wanted.keep[:, c, None], g, 0)
        driven = driven.view(H, -1, N)
        out = driven @ inject
        if grad_y is not None:
            out.baddbmm_(grad_rows, within)
            grad_within.baddbmm_(grad_rows.transpose(1, 2), rows)
            grad_emit.baddbmm_(grad_rows.transpose(1, 2), states)
        layout.paste(grad_u, start, stop, out)
        grad_inject.baddbmm_(driven.transpose(1, 2), rows)
        if dense:
            grad_carry.baddbmm_(driven.transpose(1, 2), states)
        else:
            gr, gi = driven.chunk(2, -1)
            sr, si = states.chunk(2, -1)
            grad_carry += torch.cat([(gr * sr + gi * si).sum(1), (gi * sr - gr * si).sum(1)], -1)
    of_operators = ChunkOperators(toeplitz_adjoint(grad_within, taps), grad_emit, grad_inject, grad_carry)
    return grad_u, g.transpose(0, 1), of_operators


def to_rows(sequence: torch.Tensor) -> torch.Tensor:
    """See `Implementation`."""
    return sequence.permute(2, 0, 1).contiguous()


PLAIN = Implementation(forward, backward, to_rows)


# ---- the one wiring into autograd


class _ChunkScan(torch.autograd.Function):
    """An implementation's scan and its backward. The leaves are the operators themselves, or with `make` what they are
    made of: then they are made again in the backward, where at H = 1024 and N = 64 they and what led to them would be
    200 MB a layer to keep.
    """

    @staticmethod
    def forward(ctx, implementation, make, made, wanted, save, u, initial_state, *leaves):
        operators = ChunkOperators(*leaves) if make is None else made
        save = save and any(ctx.needs_input_grad)  # the latter says nothing of no_grad
        y, final, saved = implementation.forward(u, operators, initial_state, wanted, save)
        ctx.save_for_backward(*saved, wanted.keep, *leaves)
        ctx.implementation, ctx.make, ctx.from_zero = implementation, make, initial_state is None
        ctx.wanted, ctx.length = wanted[1:], u.shape[1]
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    @first_order
    def backward(ctx, grad_y, grad_final):
        sequence, starts, before, keep, *leaves = ctx.saved_tensors
        needed = ctx.needs_input_grad[7:]
        if ctx.make is None:
            operators = ChunkOperators(*leaves)
        else:
            with torch.enable_grad(), torch.autocast(sequence.device.type, enabled=False):
                leaves = [x.detach().requires_grad_(needs) for x, needs in zip(leaves, needed, strict=True)]
                operators = ctx.make(*leaves)
        grad_u, grad_initial, gradients = ctx.implementation.backward(
            Saved(sequence, starts, before),
            ChunkOperators(*(x.detach() for x in operators)),
            Wanted(keep, *ctx.wanted),
            grad_y,
            grad_final,
            ctx.length,
        )
        if not any(needed):  # all of them frozen, as under an adapter
            gradients = [None] * len(needed)
        elif ctx.make is not None:
            gradients = _through(operators, gradients, leaves)
        return (None, None, None, None, None, grad_u, None if ctx.from_zero else grad_initial, *gradients)


def _through(operators: ChunkOperators, gradients: ChunkOperators, leaves: list[torch.Tensor]) -> list:
    """The leaves' gradients from those of the operators that were made of them."""
    pairs = [(x, g) for x, g in zip(operators, gradients, strict=True) if x.requires_grad]
    wanted = [x for x in leaves if x.requires_grad]
    found = iter(torch.autograd.grad([x for x, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True))
    return [next(found) if x.requires_grad else None for x in leaves]


def differentiable(
    implementation: Implementation,
    u: torch.Tensor,
    operators: ChunkOperators | Callable[..., ChunkOperators],
    initial_state: torch.Tensor | None = None,
    wanted: Wanted = Wanted(),  # noqa: B008  (a tuple)
    parameters: tuple[torch.Tensor, ...] = (),
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """A scan by `implementation`, differentiable in u, the initial state, and the operators or the parameters; see
    `ops.chunk_scan` for the arguments.
    """
    save = torch.is_grad_enabled()
    if isinstance(operators, ChunkOperators):
        return _ChunkScan.apply(implementation, None, None, wanted, save, u, initial_state, *operators)
    with torch.no_grad():
        made = operators(*parameters)
    return _ChunkScan.apply(implementation, operators, made, wanted, save, u, initial_state, *parameters)
