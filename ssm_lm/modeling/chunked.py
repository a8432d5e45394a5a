"""The chunk scan: any linear time-invariant state space over a sequence, in O(L), as matmuls.

Shapes: B batch, L length, H channels, N real states a channel, T tokens a chunk, p real numbers a token and channel:
1 where a channel is a real signal (S4, S4D), 2 where it is a complex one, as [real | imaginary] (a state of S5).
Everything runs in the dtype of its inputs, float32 or float64.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .activations import ACTIVATIONS
from .kernels_s4 import architecture, family, use_kernel


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


def apply_diagonal(diagonal: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """Complex product of two vectors in real form: diagonal (..., N) times state (..., N)."""
    dr, di = diagonal.chunk(2, -1)
    sr, si = state.chunk(2, -1)
    return torch.cat([dr * sr - di * si, dr * si + di * sr], -1)


# tokens x channels x batch that are cut into chunks at a time; what is cut is a copy in another order, so this bounds
# the memory beyond input, output and the chunks' states, and keeps the copies of a CPU in its cache
SEGMENT_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 27}


class _GradientInRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y.view_as(y)

    @staticmethod
    def backward(ctx, gradient):
        from .triton_chunk_scan import to_rows

        return to_rows(gradient).permute(1, 2, 0)


def gradient_in_rows(y: torch.Tensor) -> torch.Tensor:
    """y (B, L, H), a view of rows (H, B, L) as the kernel returns it -> the same, whose gradient is one too.

    Put before a matrix product, which takes rows as they are and sends a contiguous gradient back: what is elementwise
    between the kernel and here then meets one order of memory in both directions, and the kernel needs no transpose.
    """
    return _GradientInRows.apply(y)


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

    def cut(self, sequence: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Chunks start..stop of (B, L, p H) as (H, chunks * B, p T): a row a chunk."""
        if _turns_by_batch(sequence):
            rows = sequence.new_empty(self.H, stop - start, self.B, self.parts, self.T)
            for b in range(self.B):
                turned = sequence[b, start * self.T : stop * self.T].t().contiguous()
                rows[:, :, b] = turned.view(self.parts, self.H, stop - start, self.T).permute(1, 2, 0, 3)
            return rows.view(self.H, (stop - start) * self.B, self.parts * self.T)
        x = sequence.view(self.B, self.chunks, self.T, self.parts, self.H)[:, start:stop]
        return x.permute(4, 1, 0, 3, 2).reshape(self.H, (stop - start) * self.B, self.parts * self.T)

    def paste(self, sequence: torch.Tensor, start: int, stop: int, rows: torch.Tensor) -> None:
        """The inverse of `cut`, into `sequence`, which is contiguous."""
        rows = rows.view(self.H, stop - start, self.B, self.parts, self.T)
        if _turns_by_batch(sequence):
            for b in range(self.B):
                turned = rows[:, :, b].permute(2, 0, 1, 3).reshape(self.parts * self.H, -1)
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
    chunk_elements = max(1, B * T * channels)
    segment = max(1, SEGMENT_ELEMENTS.get(u.device.type, SEGMENT_ELEMENTS["cuda"]) // chunk_elements)
    return _Layout(B, L // T, T, parts, channels // parts, segment)


class _ChunkScan(torch.autograd.Function):
    """The scan and its backward, which is the same scan, transposed and run in reverse. With h_c the state at the
    start of chunk c and g_c the gradient that reaches it,

        g_c = emit^T grad y_c + carry^T g_{c+1},     grad u_c = toeplitz^T grad y_c + inject^T g_{c+1}

    and the operators' gradients are sums of outer products over the chunks. Left to autograd, the slices of a loop
    over chunks would each write a full-size zero gradient: quadratic in the length.

    Saved for the backward: u, the states at the chunks' starts, and what the operators are made of. The operators
    themselves are made again: at H = 1024 and N = 64 they and what led to them are 200 MB a layer.
    """

    @staticmethod
    def forward(ctx, make_operators, has_output, kernels, activation, save, u, initial_state, keep, *parameters):
        operators = make_operators(*parameters)
        in_kernel = kernels is not None and runs_in_kernel(u, operators, kernels)
        run = _ChunkScan._run_kernel if in_kernel else _ChunkScan._run
        saved = save and any(ctx.needs_input_grad)  # the latter says nothing of no_grad
        y, final, sequence, starts, before = run(u, operators, initial_state, keep, has_output, saved, activation)
        ctx.save_for_backward(sequence, starts, before, keep, *parameters)
        ctx.make_operators, ctx.in_kernel, ctx.from_zero = make_operators, in_kernel, initial_state is None
        ctx.activation = activation
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    def _run_kernel(u, operators, initial_state, keep, has_output, saved, activation):
        """y, the final state, u as the backward reads it, the states at the chunks' starts, y before its activation."""
        from .triton_chunk_scan import scan

        rows = _to_rows(u)
        y, final, starts, before = scan(rows, *operators, initial_state, keep, has_output, saved, activation)
        return y.permute(1, 2, 0) if has_output else None, final, rows, starts, before

    @staticmethod
    def _run(u, operators, initial_state, keep, has_output, saved, activation):
        """As `_run_kernel`."""
        taps, emit, inject, carry = operators
        layout = _layout(u, taps)
        dense = carry.dim() == 3
        H, B, N = layout.H, layout.B, inject.shape[1]
        carry_t = carry.transpose(-1, -2) if dense else carry.unsqueeze(1)
        inject_t, emit_t, within_t = (x.transpose(1, 2) for x in (inject, emit, toeplitz(taps)))
        starts = u.new_empty(H, layout.chunks if saved else layout.segment, B, N)
        state = u.new_zeros(H, B, N) if initial_state is None else initial_state.transpose(0, 1)
        y = torch.empty_like(u, memory_format=torch.contiguous_format) if has_output else None
        u = u.contiguous()
        for start, stop in layout.segments():
            rows = layout.cut(u, start, stop)
            driven = (rows @ inject_t).view(H, stop - start, B, N)
            at = starts[:, start:stop] if saved else starts[:, : stop - start]
            for c in range(start, stop):
                if keep is not None:
                    state = torch.where(keep[:, c, None], state, 0)
                at[:, c - start] = state
                if dense:
                    state = torch.baddbmm(driven[:, c - start], state, carry_t)
                else:
                    state = apply_diagonal(carry_t, state) + driven[:, c - start]
            if has_output:
                out = rows @ within_t
                out.baddbmm_(at.reshape(H, -1, N), emit_t)
                layout.paste(y, start, stop, out)
        state = state.transpose(0, 1)
        if not has_output or activation == "identity":
            return y, state, u, starts, None
        return ACTIVATIONS[activation].function(y), state, u, starts, y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y, grad_state):
        u, starts, before, keep, *parameters = ctx.saved_tensors
        needed = ctx.needs_input_grad[8:]
        if ctx.make_operators is ChunkOperators:
            operators = ChunkOperators(*parameters)
        else:
            with torch.enable_grad(), torch.autocast(u.device.type, enabled=False):
                parameters = [p.detach().requires_grad_(needs) for p, needs in zip(parameters, needed, strict=True)]
                operators = ctx.make_operators(*parameters)
        if ctx.in_kernel:
            reverse = partial(_ChunkScan._reverse_kernel, ctx.from_zero)
            if grad_y is not None:
                grad_y = _to_rows(grad_y)
        else:
            reverse = _ChunkScan._reverse
        if grad_y is not None:
            grad_y = ACTIVATIONS[ctx.activation].backward(grad_y, before)
        gradients = reverse(u, starts, keep, grad_y, grad_state, *(x.detach() for x in operators))
        grad_u, grad_initial, grad_operators = gradients
        if not any(needed):  # all of them frozen, as under an adapter
            grad_operators = [None] * len(needed)
        elif ctx.make_operators is not ChunkOperators:
            pairs = [(x, g) for x, g in zip(operators, grad_operators, strict=True) if x.requires_grad]
            wanted = [p for p in parameters if p.requires_grad]
            found = iter(torch.autograd.grad([x for x, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True))
            grad_operators = [next(found) if needs else None for needs in needed]
        return (None, None, None, None, None, grad_u, None if ctx.from_zero else grad_initial, None, *grad_operators)

    @staticmethod
    def _reverse_kernel(from_zero, rows, starts, keep, grad_y, grad_state, *operators):
        from .triton_chunk_scan import from_rows, operator_gradients, scan_backward

        grad_u, grad_initial, gram = scan_backward(grad_y, grad_state, rows, starts, keep, *operators, from_zero)
        return from_rows(grad_u), grad_initial, operator_gradients(gram, operators[0], operators[3])

    @staticmethod
    def _reverse(u, starts, keep, grad_y, grad_state, taps, emit, inject, carry):
        """Gradients of u, of the initial state and of the operators."""
        layout, within = _layout(u, taps), toeplitz(taps)
        dense = carry.dim() == 3
        H, B, N = layout.H, layout.B, inject.shape[1]
        if not dense:
            re, im = carry.unsqueeze(1).chunk(2, -1)
            conjugate = torch.cat([re, -im], -1)
        g = u.new_zeros(H, B, N) if grad_state is None else grad_state.transpose(0, 1)
        grad_u = torch.empty_like(u)
        grad_y = None if grad_y is None else grad_y.contiguous()
        grad_within, grad_emit, grad_inject, grad_carry = (
            torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (within, emit, inject, carry)
        )
        for start, stop in reversed(layout.segments()):
            rows, states = layout.cut(u, start, stop), starts[:, start:stop].reshape(H, -1, N)
            driven = u.new_empty(H, stop - start, B, N)  # the gradient of inject u_c
            if grad_y is not None:
                grad_rows = layout.cut(grad_y, start, stop)
                emitted = (grad_rows @ emit).view(H, stop - start, B, N)
            for c in range(stop - 1, start - 1, -1):
                driven[:, c - start] = g
                g = g @ carry if dense else apply_diagonal(conjugate, g)
                if grad_y is not None:
                    g = g + emitted[:, c - start]
                if keep is not None:
                    g = torch.where(keep[:, c, None], g, 0)
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
        return grad_u, g.transpose(0, 1), (toeplitz_adjoint(grad_within, taps), grad_emit, grad_inject, grad_carry)


def _to_rows(sequence: torch.Tensor) -> torch.Tensor:
    from .triton_chunk_scan import to_rows

    return to_rows(sequence)


# ---- what the kernels take, beyond which a program's operators leave its registers

KERNEL_DTYPES = (torch.bfloat16, torch.float32)
LARGEST_STATE = 128


def longest_chunk(dtype: torch.dtype, N: int, dense: bool) -> int:
    """How many tokens a chunk may have; dtype: one of KERNEL_DTYPES."""
    if dtype == torch.bfloat16:
        return 64
    return 16 if dense and N > 64 else 32


def largest_state(architecture: str, dense: bool) -> int:
    """How many states a channel may have: of a dense carry, more than 64 take the shared memory (above 100 KiB) that
    NVIDIA's data centre cards have, and no others.
    """
    small = family(architecture) in ("cuda", "blackwell") and architecture not in ("sm_80", "sm_90", "sm_100", "sm_103")
    return 64 if dense and small else LARGEST_STATE


def runs_in_kernel(u: torch.Tensor, operators: ChunkOperators, setting: str = "auto") -> bool:
    """Whether `chunk_scan` of u (B, L, p H) by these operators runs in the Triton kernel; see `use_kernel`."""
    taps, _, inject, carry = operators
    T, N, dense = taps.shape[-1], inject.shape[1], carry.dim() == 3
    unsupported = unsupported_by_kernel(u, u.dtype, N, dense)
    if taps.dim() == 3:
        unsupported = "its signals are complex"
    elif unsupported is None and T > longest_chunk(u.dtype, N, dense):
        unsupported = f"its chunks have {T} tokens, more than {longest_chunk(u.dtype, N, dense)}"
    return use_kernel("chunk_scan", u, unsupported=unsupported, setting=setting, problem=(u.dtype, N, dense))


def unsupported_by_kernel(u: torch.Tensor, dtype: torch.dtype, N: int, dense: bool) -> str | None:
    """What the kernel cannot do of a scan of real signals u, taken as `dtype`, with N states a channel, or None."""
    if dtype not in KERNEL_DTYPES:
        return f"its numbers are {dtype}, not bfloat16 or float32"
    largest = largest_state(architecture(u.device), dense)
    return f"its state has {N} numbers a channel, more than {largest}" if N > largest else None


def chunk_scan(
    u: torch.Tensor,
    operators: ChunkOperators | Callable[..., ChunkOperators],
    initial_state: torch.Tensor | None = None,
    keep: torch.Tensor | None = None,
    parameters: tuple[torch.Tensor, ...] = (),
    has_output: bool = True,
    kernels: str | None = "auto",
    activation: str = "identity",
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Run an LTI state space over u in chunks: O(L), matmuls within a chunk and one small recurrence between them.

    u: (B, L, p H) with L a multiple of the operators' T; initial_state: (B, H, N), None for zero. The kernel takes
    any L from a zero state, u in bfloat16 beside float32 operators, and returns y as a view of (H, B, L).
    operators: the four operators, or a function of `parameters` that makes them. They come from the function alone
    and from nothing else that needs a gradient, and are made a second time in the backward instead of being kept.
    keep: (B, chunks) bool; where it is False, the chunk starts from a zero state: a new document.
    kernels: whether the Triton kernel runs; see `use_kernel`. None: it does not, whatever the environment says.
    activation: what y goes through, one of ACTIVATIONS; the kernel applies it before y is rounded.
    Returns y (B, L, p H), None without has_output, and the final state (B, H, N). Both are differentiable.
    """
    if isinstance(operators, ChunkOperators):
        if kernels is not None and runs_in_kernel(u, operators, kernels):
            from .triton_chunk_scan import fused_chunk_scan

            return fused_chunk_scan(u, operators, initial_state, keep, has_output, activation)
        return plain_chunk_scan(u, operators, initial_state, keep, has_output, activation)
    save = torch.is_grad_enabled()
    return _ChunkScan.apply(operators, has_output, kernels, activation, save, u, initial_state, keep, *parameters)


def plain_chunk_scan(
    u, operators: ChunkOperators, initial_state=None, keep=None, has_output=True, activation="identity"
):
    """`chunk_scan` in plain PyTorch, whatever the device: the kernel's twin."""
    save = torch.is_grad_enabled()
    return _ChunkScan.apply(ChunkOperators, has_output, None, activation, save, u, initial_state, keep, *operators)
