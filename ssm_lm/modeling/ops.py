"""The operations that state space layers are made of, each with its twin in plain PyTorch and its Triton kernel.

    operation     twin                                      kernel, imported when it is first asked for
    chunk scan    chunked.py                                triton_chunk_scan.py
    S5's scan     prefix_scans.py, token by token           triton_s5_scan.py
    SSD's scan    ssd_chunks.py                             triton_ssd_scan.py
    its b and c   discrete.py                               triton_ssd_system.py
    a step        discrete.py                               triton_step.py, triton_ssd_step.py
    short taps    short_taps.py                             triton_short_convolution.py
    S4's system   dplr_discretization.py                    triton_dplr_discretization.py
    S4D's system  diagonal_discretization.py                triton_diagonal_discretization.py
    S4D operators diagonal_operators.py                     triton_diagonal_operators.py
    S4 operators  dplr_operators.py                         triton_dplr_operators.py
    RMS norm      rms_norm.py                               triton_rms_norm.py
    layer norm    layer_norm.py                             triton_layer_norm.py
    dropout       dropped.py, with given factors            triton_dropout.py
    loss          cross_entropy.py                          triton_cross_entropy.py
    Cauchy        cauchy.py                                 triton_cauchy.py
    Vandermonde   vandermonde.py                            triton_vandermonde.py

On a CPU S4's and S4D's systems and operators and the chunk scans but S5's have a third form beside twin and kernel, in
C: native_systems.py, native_operators.py, native_diagonal.py, native_scan.py and native_ssd.py.

This is the one place where the two meet. The twins lie below and know no kernel; a kernel's file knows its twin, to
check itself against it; what lies above says whether the kernel runs, as execution.py or kernels_s4.py has decided.

Shapes: B batch, L length, H channels (hidden_size), N order of the real system (state_size), T chunk length.
"""

from collections.abc import Callable

import torch

from .cauchy import cauchy
from .cauchy import cauchy_products as plain_cauchy_products
from .chunked import PLAIN, ChunkOperators, Wanted, differentiable, toeplitz
from .cross_entropy import logits_to_loss as plain_logits_to_loss
from .diagonal_discretization import diagonal_system as plain_diagonal_system
from .diagonal_discretization import discretize_diagonal
from .diagonal_operators import power_operators
from .discrete import DiscreteDiagonal, DiscreteDPLR, norm_vectors
from .dplr_discretization import bilinear_dplr
from .dplr_operators import krylov_operators
from .kernel_limits import (
    LARGEST_OPERATOR_STATE,
    LARGEST_STATE,
    limit_of_cauchy,
    limit_of_diagonal_operators,
    limit_of_dplr_operators,
    limit_of_vandermonde,
)
from .kernels_s4 import Operation, kernel_status, use_kernel
from .layer_norm import layer_norm as plain_layer_norm
from .native_diagonal import is_for_the_library as diagonal_is_for_the_library
from .native_diagonal import native_diagonal
from .native_operators import is_for_the_library, native_operators
from .native_scan import NATIVE
from .native_ssd import native_ssd_scan
from .native_systems import MOST_RANK, native_diagonal_system, native_dplr_system
from .native_systems import is_for_the_library as system_is_for_the_library
from .prefix_scans import associative_scan, complex_scan
from .real_form import apply_diagonal, powers
from .rms_norm import rms_norm as plain_rms_norm
from .short_taps import convolve_taps
from .ssd_chunks import scan_vectors
from .vandermonde import vandermonde as plain_vandermonde

__all__ = [
    "ChunkOperators",
    "apply_diagonal",
    "associative_scan",
    "cauchy",
    "cauchy_products",
    "chunk_scan",
    "diagonal_operators",
    "diagonal_steps",
    "diagonal_system",
    "dplr_discretization",
    "dplr_operators",
    "drop_activated",
    "drop_added",
    "drop_gated",
    "drop_swiglu",
    "fft_convolution",
    "gradient_in_rows",
    "kernel_status",
    "layer_norm",
    "logits_to_loss",
    "mimo_step",
    "powers",
    "rms_norm",
    "s5_scan",
    "short_convolution",
    "siso_step",
    "ssd_scan",
    "ssd_step",
    "ssd_vectors",
    "state_system",
    "toeplitz",
    "use_kernel",
    "vandermonde",
]


def fft_convolution(u: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """Causal convolution y_t = sum_{s <= t} kernel_{t-s} u_s by FFT. u (B, L, H), kernel (H, L) -> (B, L, H)."""
    L = u.shape[1]
    size = 1 << (2 * L - 1).bit_length()  # zero-padded so that the circular convolution is a linear one
    spectrum = torch.fft.rfft(u.transpose(1, 2), n=size) * torch.fft.rfft(kernel, n=size)
    return torch.fft.irfft(spectrum, n=size)[..., :L].transpose(1, 2)


# ---- the chunk scan


def _load_chunk_scan():
    from .triton_chunk_scan import FUSED, self_check_cases

    return FUSED, self_check_cases


CHUNK_SCAN = Operation("chunk_scan", PLAIN, _load_chunk_scan)


def chunk_scan(
    u: torch.Tensor,
    operators: ChunkOperators | Callable[..., ChunkOperators],
    initial_state: torch.Tensor | None = None,
    keep: torch.Tensor | None = None,
    parameters: tuple[torch.Tensor, ...] = (),
    has_output: bool = True,
    activation: str = "identity",
    rest: bool = False,
    run_kernel: bool = False,
    in_c: bool = False,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Run an LTI state space over u in chunks: O(L), matmuls within a chunk and one small recurrence between them.

    u: (B, L, p H) with L a multiple of the operators' T, in their dtype or in bfloat16 beside float32 operators;
    initial_state: (B, H, N), None for zero. The kernel takes any L from a zero state, and returns y as a view of
    (H, B, L); where u is such a view, it is not copied, and its gradient is one too.
    operators: the four operators, or a function of `parameters` that makes them. They come from the function alone
    and from nothing else that needs a gradient, and are made a second time in the backward instead of being kept.
    keep: (B, chunks) bool; where it is False, the chunk starts from a zero state: a new document.
    activation: what y goes through, one of ACTIVATIONS; the kernel applies it before y is rounded.
    rest: see `chunked.Wanted`.
    run_kernel: whether the Triton kernel runs. Those of `kernel_limits` are the caller's to know.
    in_c: whether the library does, where the kernel does not; `scans_in_c` knows.
    Returns y (B, L, p H), None without has_output, and the final state (B, H, N). Both are differentiable.
    """
    wanted = Wanted(keep, has_output, activation, rest, in_rows=u.permute(2, 0, 1).is_contiguous())
    implementation = NATIVE if in_c and not run_kernel else CHUNK_SCAN.either(run_kernel)
    return differentiable(implementation, u, operators, initial_state, wanted, parameters)


class _GradientInRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y.view_as(y)

    @staticmethod
    def backward(ctx, gradient):
        return CHUNK_SCAN.either(True).to_rows(gradient).permute(1, 2, 0)


def gradient_in_rows(y: torch.Tensor) -> torch.Tensor:
    """y (B, L, H), a view of rows (H, B, L) as the kernel returns it -> the same, whose gradient is one too.

    Put before a matrix product, which takes rows as they are and sends a contiguous gradient back: what is elementwise
    between the kernel and here then meets one order of memory in both directions, and the kernel needs no transpose.
    """
    return _GradientInRows.apply(y)


# ---- S5's scan


def _load_s5_scan():
    from .triton_s5_scan import s5_scan, self_check_cases

    return s5_scan, self_check_cases


S5_SCAN = Operation("s5_scan", complex_scan, _load_s5_scan)


def s5_scan(u, log_re, log_im, initial_state=None, begins=None) -> tuple[torch.Tensor, torch.Tensor]:
    """`complex_scan` by its Triton kernel. Where that does not run, a layer takes the chunk scan of its complex
    signals, which is made of matmuls, and not the twin, which goes token by token.
    """
    return S5_SCAN.either(True)(u, log_re, log_im, initial_state, begins)


# ---- SSD's scan


def _load_ssd_scan():
    from .triton_ssd_scan import self_check_cases, ssd_scan

    return ssd_scan, self_check_cases


SSD_SCAN = Operation("ssd_scan", scan_vectors, _load_ssd_scan)


def ssd_scan(
    run_kernel: bool, v, b, c, dt, decay, omega, skip, state, begins, T: int, has_output: bool = True, in_c=False
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """`scan_vectors` of ssd_chunks.py, by its Triton kernels if run_kernel, else by the library if in_c."""
    scan = native_ssd_scan if in_c and not run_kernel else SSD_SCAN.either(run_kernel)
    return scan(v, b, c, dt, decay, omega, skip, state, begins, T, has_output)


def _load_ssd_system():
    from .triton_ssd_system import self_check_cases, ssd_vectors

    return ssd_vectors, self_check_cases


SSD_SYSTEM = Operation("ssd_system", norm_vectors, _load_ssd_system)


def ssd_vectors(x, b_scale, b_bias, c_scale, c_bias, run_kernel: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """`norm_vectors` of discrete.py, or with run_kernel its Triton kernel, which returns them in the dtype of x."""
    return SSD_SYSTEM.either(run_kernel)(x, b_scale, b_bias, c_scale, c_bias)


# ---- the short convolution


def _load_short_convolution():
    from .triton_short_convolution import self_check_cases, short_convolution

    return short_convolution, self_check_cases


SHORT_CONVOLUTION = Operation("short_convolution", convolve_taps, _load_short_convolution)


def short_convolution(
    u,
    weight,
    bias,
    tail,
    begins,
    seq_idx,
    activation: str = "identity",
    has_tail: bool = True,
    run_kernel: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`convolve_taps`, or its Triton kernel with run_kernel, whose limits the caller knows."""
    return SHORT_CONVOLUTION.either(run_kernel)(u, weight, bias, tail, begins, seq_idx, activation, has_tail)


# ---- the RMS norm


def _load_rms_norm():
    from .triton_rms_norm import rms_norm, self_check_cases

    return rms_norm, self_check_cases


RMS_NORM = Operation("rms_norm", plain_rms_norm, _load_rms_norm)


def rms_norm(
    x,
    weight,
    eps: float,
    gate=None,
    dtype: torch.dtype | None = None,
    run_kernel: bool = False,
    with_input: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`rms_norm.rms_norm`, or its Triton kernel with run_kernel, whose limits the caller knows."""
    return RMS_NORM.either(run_kernel)(x, weight, eps, gate, dtype, with_input)


# ---- the layer norm


def _load_layer_norm():
    from .triton_layer_norm import layer_norm, self_check_cases

    return layer_norm, self_check_cases


LAYER_NORM = Operation("layer_norm", plain_layer_norm, _load_layer_norm)


def layer_norm(
    x, weight, bias, eps: float, dtype: torch.dtype, turned: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """`layer_norm.layer_norm` by its Triton kernel. turned: y (..., C) is a view of (C, ...)."""
    return LAYER_NORM.either(True)(x, weight, bias, eps, dtype, turned)


# ---- dropout with what stands beside it. Where the kernel does not run, PyTorch's own draws other factors


def _load_dropout():
    from .triton_dropout import drop_activated, drop_added, drop_gated, drop_swiglu, self_check_cases

    return (drop_activated, drop_gated, drop_added, drop_swiglu), self_check_cases


DROPOUT = Operation("dropout", None, _load_dropout)


def drop_activated(x, activation: str, p: float) -> torch.Tensor:
    """dropout(act(x)) with probability p by the Triton kernel; y lies in memory as x does."""
    return DROPOUT.either(True)[0](x, activation, p)


def drop_gated(residual, x, bias, p: float) -> torch.Tensor:
    """residual + dropout(glu(x + bias)) by the Triton kernel."""
    return DROPOUT.either(True)[1](residual, x, bias, p)


def drop_added(residual, x, p: float) -> torch.Tensor:
    """residual + dropout(x) by the Triton kernel."""
    return DROPOUT.either(True)[2](residual, x, p)


def drop_swiglu(gate, up, p: float) -> torch.Tensor:
    """dropout(silu(gate) up) by the Triton kernel; p may be 0."""
    return DROPOUT.either(True)[3](gate, up, p)


# ---- the loss of logits


def _load_cross_entropy():
    from .triton_cross_entropy import logits_to_loss, self_check_cases

    return logits_to_loss, self_check_cases


CROSS_ENTROPY = Operation("cross_entropy", plain_logits_to_loss, _load_cross_entropy)


def logits_to_loss(
    z, targets, bias=None, gradient: bool = True, run_kernel: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`cross_entropy.logits_to_loss`, or its Triton kernel with run_kernel, whose limits the caller knows."""
    return CROSS_ENTROPY.either(run_kernel)(z, targets, bias, gradient)


# ---- a step. Its twin is the `step` of the discrete system itself, in discrete.py


def _load_step():
    from .triton_step import mimo_step_, self_check_cases, siso_step_

    return (siso_step_, mimo_step_), self_check_cases


STEP = Operation("step", None, _load_step)


def siso_step(u, state, coefficients, skip, activation: str) -> torch.Tensor:
    """One token of S4 or S4D by the Triton kernel: u (B, H) -> y; the state advances in place. See triton_step.py."""
    return STEP.either(True)[0](u, state, coefficients, skip, activation)


def mimo_step(u, state, Lambda, weight_in, weight_out, skip, activation: str) -> torch.Tensor:
    """The same of S5."""
    return STEP.either(True)[1](u, state, Lambda, weight_in, weight_out, skip, activation)


def _load_ssd_step():
    from .triton_ssd_step import self_check_cases, ssd_step_

    return ssd_step_, self_check_cases


SSD_STEP = Operation("ssd_step", None, _load_ssd_step)


def ssd_step(x, state, transition, steps, norms, skip, activation: str) -> torch.Tensor:
    """The same of SSD: x (B, input_size) -> y (B, H). See triton_ssd_step.py."""
    return SSD_STEP.either(True)(x, state, transition, steps, norms, skip, activation)


# ---- S4's system, and the operators of a chunk of it


def _load_dplr_discretization():
    from .triton_dplr_discretization import dplr_discretization, self_check_cases

    return dplr_discretization, self_check_cases


DPLR_DISCRETIZATION = Operation("dplr_discretization", bilinear_dplr, _load_dplr_discretization)


def dplr_discretization(log_dt, Lambda_log_re, Lambda_im, P, B, C, setting: str = "auto") -> DiscreteDPLR:
    """The discrete system of S4's parameters; see dplr_discretization.py. setting: S4Config's key `kernels`."""
    parameters, rank = (log_dt, Lambda_log_re, Lambda_im, P, B, C), len(P)
    run_kernel = DPLR_DISCRETIZATION.runs_kernel(
        *parameters,
        unsupported=limit_of_dplr_operators(log_dt.dtype, rank),
        setting=setting,
        problem=(B.shape[-1], rank),
    )
    if not run_kernel and rank <= MOST_RANK and system_is_for_the_library(parameters, setting, has_gradients=True):
        return native_dplr_system(*parameters)
    return DPLR_DISCRETIZATION.either(run_kernel)(*parameters)


def _load_dplr_operators():
    from .triton_dplr_operators import dplr_operators, self_check_cases

    return dplr_operators, self_check_cases


DPLR_OPERATORS = Operation("dplr_operators", krylov_operators, _load_dplr_operators)


def dplr_operators(
    discrete: DiscreteDPLR, length: int, skip: torch.Tensor | None = None, setting: str = "auto"
) -> ChunkOperators:
    """The operators of a chunk of `length` tokens; see dplr_operators.py, and on a CPU native_operators.py.

    setting: S4Config's key `kernels`.
    """
    N, rank = discrete.F.shape[1:]
    # of more states there is a scan's kernel and none of operators: `kernels: triton` forces what there is
    run_kernel = N <= LARGEST_OPERATOR_STATE and DPLR_OPERATORS.runs_kernel(
        *discrete,
        unsupported=limit_of_dplr_operators(discrete.E.dtype, rank),
        setting=setting,
        problem=(N, rank),
    )
    if not run_kernel and is_for_the_library(discrete, skip, setting):
        return native_operators(discrete, length, skip)
    return DPLR_OPERATORS.either(run_kernel)(*discrete, length, skip)


# ---- S4D's system, and the operators of a chunk of it


def _load_diagonal_discretization():
    from .triton_diagonal_discretization import diagonal_discretization, self_check_cases

    return diagonal_discretization, self_check_cases


DIAGONAL_DISCRETIZATION = Operation("diagonal_discretization", plain_diagonal_system, _load_diagonal_discretization)


def diagonal_system(
    log_dt, Lambda_log_re, Lambda_im, B, C, method: str, setting: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """log Lambda_bar and C B_bar of S4D's parameters, (re, im) each; see diagonal_discretization.py.

    method: S4Config's key `discretization`; setting: its key `kernels`.
    """
    parameters, N = (log_dt, Lambda_log_re, Lambda_im, B, C), C.shape[1]
    run_kernel = _discretizes_on_kernel(parameters, method, N, setting)
    if not run_kernel and method == "zoh" and system_is_for_the_library(parameters, setting, has_gradients=False):
        return native_diagonal_system(*parameters)[:4]
    return DIAGONAL_DISCRETIZATION.either(run_kernel)(*parameters, method)


def diagonal_steps(log_dt, Lambda_log_re, Lambda_im, B, C, method: str, setting: str = "auto") -> DiscreteDiagonal:
    """`diagonal_system`, and what a step reads of it."""
    parameters = log_dt, Lambda_log_re, Lambda_im, B, C
    if method == "zoh" and system_is_for_the_library(parameters, setting, has_gradients=False):
        return native_diagonal_system(*parameters)
    log_re, log_im, *CB = diagonal_system(*parameters, method, setting)
    Lambda_bar = torch.cat(powers(log_re, log_im, log_re.new_ones(())), -1).to(log_dt.dtype)
    return DiscreteDiagonal(log_re, log_im, *CB, Lambda_bar, 2 * torch.cat([CB[0], -CB[1]], -1))


def state_system(
    log_dt, Lambda_log_re, Lambda_im, method: str, setting: str = "auto"
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """log Lambda_bar, float64, and B_bar / B of S5's states, (P/2,), a pair (re, im) each; see `discretize_diagonal`.

    The kernel takes them as so many systems of one state, whose B and C are 1. method, setting: as above.
    """
    if not _discretizes_on_kernel((log_dt, Lambda_log_re, Lambda_im), method, 2, setting):
        dt = log_dt.double().exp()
        return discretize_diagonal(method, dt, -dt * Lambda_log_re.double().exp(), dt * Lambda_im.double())
    one = torch.eye(1, 2, dtype=log_dt.dtype, device=log_dt.device).expand(len(log_dt), 2).contiguous()
    columns = log_dt, Lambda_log_re[:, None], Lambda_im[:, None], one, one
    *log, re, im = (x.flatten() for x in DIAGONAL_DISCRETIZATION.either(True)(*columns, method))
    return tuple(log), (re, im)


def _discretizes_on_kernel(parameters, method: str, N: int, setting: str) -> bool:
    """Of another method or dtype, or of more states, there is no kernel: `kernels: triton` forces what there is."""
    has_kernel = method == "zoh" and N <= LARGEST_STATE and limit_of_diagonal_operators(parameters[0].dtype) is None
    return has_kernel and DIAGONAL_DISCRETIZATION.runs_kernel(*parameters, setting=setting, problem=(N,))


def _load_diagonal_operators():
    from .triton_diagonal_operators import diagonal_operators, self_check_cases

    return diagonal_operators, self_check_cases


DIAGONAL_OPERATORS = Operation("diagonal_operators", power_operators, _load_diagonal_operators)


def diagonal_operators(
    system: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    length: int,
    skip: torch.Tensor | None = None,
    setting: str = "auto",
) -> ChunkOperators:
    """The operators of a chunk of `length` tokens of a `diagonal_system`, or of the first four of a `DiscreteDiagonal`;
    see diagonal_operators.py, and on a CPU native_diagonal.py.

    setting: S4Config's key `kernels`.
    """
    _, _, CB_re, _ = parts = system[:4]
    N = 2 * CB_re.shape[1]
    run_kernel = N <= LARGEST_STATE and DIAGONAL_OPERATORS.runs_kernel(
        *parts, unsupported=limit_of_diagonal_operators(CB_re.dtype), setting=setting, problem=(N,)
    )
    if not run_kernel and diagonal_is_for_the_library(parts, setting):
        return native_diagonal(*parts, length, skip)
    return DIAGONAL_OPERATORS.either(run_kernel)(*parts, length, skip)


# ---- the kernels of convolutions


def _load_cauchy():
    from .triton_cauchy import cauchy_products_kernel, self_check_cases

    return cauchy_products_kernel, self_check_cases


CAUCHY = Operation("cauchy", plain_cauchy_products, _load_cauchy)


def cauchy_products(
    C: torch.Tensor,
    B: torch.Tensor,
    P: torch.Tensor,
    Lambda_re: torch.Tensor,
    Lambda_im: torch.Tensor,
    dt: torch.Tensor,
    nodes: torch.Tensor,
    setting: str = "auto",
) -> torch.Tensor:
    """The Cauchy products of a diagonal plus low-rank system; see cauchy.py. setting: S4Config's key `kernels`."""
    run_kernel = CAUCHY.runs_kernel(
        C, B, P, Lambda_re, dt, nodes, unsupported=limit_of_cauchy(C.dtype, len(P)), setting=setting
    )
    return CAUCHY.either(run_kernel)(C, B, P, Lambda_re, Lambda_im, dt, nodes)


def _load_vandermonde():
    from .triton_vandermonde import self_check_cases, vandermonde_kernel

    return vandermonde_kernel, self_check_cases


VANDERMONDE = Operation("vandermonde", plain_vandermonde, _load_vandermonde)


def vandermonde(
    v_re: torch.Tensor,
    v_im: torch.Tensor,
    log_re: torch.Tensor,
    log_im: torch.Tensor,
    length: int,
    setting: str = "auto",
) -> torch.Tensor:
    """The Vandermonde product of a diagonal system; see vandermonde.py. setting: S4Config's key `kernels`."""
    run_kernel = VANDERMONDE.runs_kernel(
        v_re, v_im, log_re, log_im, unsupported=limit_of_vandermonde(v_re.dtype), setting=setting
    )
    return VANDERMONDE.either(run_kernel)(v_re, v_im, log_re, log_im, length)
