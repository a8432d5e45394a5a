"""The discrete systems of S4 and S4D on a CPU, by the library of native_systems_source.py: S4's with its gradients,
S4D's where none is asked for. Of a prompt of a few dozen tokens the two take longer in PyTorch than all of its steps;
of a step of training S4 the hundred small operations, and three times as many back, are 3 to 4%.

It stands for dplr_discretization.py and diagonal_discretization.py, its twins, of parameters in float32. It computes in
float64, as the second of them does. In graphs, for few channels and where there is no compiler, the twins run.

Shapes: H channels, S systems that they share, N order of the real system.
"""

import torch

from .discrete import DiscreteDiagonal, DiscreteDPLR
from .dplr_discretization import bilinear_dplr
from .native_library import doubles, floats, for_c, library
from .native_operators import may_run, threads_for

SMALLEST = 1 << 12  # numbers of all states, 64 of 64 channels: of fewer the twins take no time either
MOST_RANK = 2  # of the source


def is_for_the_library(parameters: tuple[torch.Tensor, ...], setting: str, has_gradients: bool) -> bool:
    """Whether one of those below is to run, which has gradients or has not; the last of the parameters is C. setting:
    S4Config's key `kernels`.
    """
    if torch.is_grad_enabled() and not has_gradients:
        return False
    if parameters[-1].numel() < SMALLEST or not may_run(parameters, setting):
        return False
    return all(x.dtype == torch.float32 for x in parameters) and library("systems") is not None


def native_dplr_system(log_dt, Lambda_log_re, Lambda_im, P, B, C) -> DiscreteDPLR:
    """`bilinear_dplr`, for P (rank, S, N), rank at most MOST_RANK."""
    return DiscreteDPLR(*_System.apply(log_dt, Lambda_log_re, Lambda_im, P, B, C))


class _System(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *parameters):
        ctx.save_for_backward(*parameters)
        sizes = H, _, half, rank = _sizes(*parameters[:-1])
        vectors, low_rank = (H, 2 * half), (H, 2 * half, rank)
        found = [floats(*shape) for shape in (vectors, low_rank, low_rank, vectors, vectors)]
        _call("dplr_system", sizes, parameters, found)
        return tuple(found)

    @staticmethod
    def backward(ctx, *gradients):
        log_dt, *shared, C = parameters = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a second derivative
            _, back = torch.func.vjp(bilinear_dplr, *parameters)
            return back(DiscreteDPLR(*gradients))
        sizes = H, S, half, rank = _sizes(log_dt, *shared)
        found = [floats(*shape) for shape in ((H,), (H, half), (H, half), (rank, H, 2 * half), (H, 2 * half), C.shape)]
        _call("dplr_system_backward", sizes, (log_dt, *shared, *gradients), found)
        of_log_dt, *of_shared, of_C = found
        return of_log_dt, *(x.unflatten(-2, (-1, S)).sum(-3) for x in of_shared), of_C


def _sizes(log_dt, Lambda_log_re, Lambda_im, P, B) -> tuple[int, int, int, int]:
    """H, S, N / 2, rank"""
    return len(log_dt), *Lambda_im.shape, len(P)


def native_dplr_numbers(log_dt, Lambda_log_re, Lambda_im, P, B) -> torch.Tensor:
    """Of the same system what single steps of one row read beside E, C_row and what the channels share, P and B:
    (H, 1 + rank + rank^2); without gradients.
    """
    parameters = log_dt, Lambda_log_re, Lambda_im, P, B
    sizes = H, _, _, rank = _sizes(*parameters)
    found = floats(H, 1 + rank + rank**2)
    _call("dplr_numbers", sizes, parameters, [found])
    return found


def native_diagonal_system(log_dt, Lambda_log_re, Lambda_im, B, C) -> DiscreteDiagonal:
    """`diagonal_system` by zero-order hold, and what a step reads of it; without gradients."""
    H, N = C.shape
    halves = [make(H, N // 2) for make in (doubles, doubles, floats, floats)]
    found = [*halves, floats(H, N), floats(H, N)]
    _call("diagonal_system", (H, len(B), N // 2), (log_dt, Lambda_log_re, Lambda_im, B, C), found)
    return DiscreteDiagonal(*found)


def _call(name: str, sizes: tuple[int, ...], parameters, found) -> None:
    """A function of the library, with threads for it."""
    parameters = [x.detach().contiguous() for x in parameters]  # kept until it returns
    getattr(library("systems"), name)(*map(for_c, (*sizes, *parameters, *found, threads_for(sizes[0]))))
