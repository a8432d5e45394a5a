"""The recurrence of a diagonal system with one step for the whole batch, x_t = Lambda x_{t-1} + u_t, over a sequence.

Shapes: B batch, L length, P/2 complex states as [real | imaginary], so P real numbers. S5 is made of it; its Triton
kernel is triton_s5_scan.py.
"""

import torch
import torch.nn.functional as F

from .real_form import apply_diagonal, powers


def associative_scan(log_re: torch.Tensor, log_im: torch.Tensor, drive: torch.Tensor) -> torch.Tensor:
    """x_t = Lambda x_{t-1} + u_t from zero, as a parallel prefix in log2(L) passes over the sequence.

    Elements (a, b) combine as (a_1, b_1)(a_2, b_2) = (a_2 a_1, a_2 b_1 + b_2). Lambda is the same at every step, so
    after k passes every a is Lambda^(2^k), and only the b are a sequence. log_re, log_im: log Lambda, (P/2,);
    drive u: (B, L, P) as [real | imaginary] -> x, likewise.

    Source: Blelloch, "Prefix Sums and Their Applications" (1990); used for S5 by Smith et al. (2023).
    """
    x, reach = drive, 1
    while reach < drive.shape[1]:
        power = torch.cat(powers(log_re, log_im, torch.tensor(float(reach), device=drive.device)), -1).to(drive.dtype)
        x = x + F.pad(apply_diagonal(power, x[:, :-reach]), (0, 0, reach, 0))
        reach *= 2
    return x


def gradient_of_logs(parts: torch.Tensor, Lambda: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of log Lambda, (P/2,) each in float64: conj(Lambda) w, for Lambda = exp(log Lambda).

    parts (B, chunks, P): of w, the sum over the tokens of lambda_t conj(x_(t-1)). Lambda (P,).
    """
    (w_re, w_im), (l_re, l_im) = (x.chunk(2) for x in (parts.sum((0, 1), dtype=torch.float64), Lambda.double()))
    return l_re * w_re + l_im * w_im, l_re * w_im - l_im * w_re


def complex_scan(
    u: torch.Tensor,
    log_re: torch.Tensor,
    log_im: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    begins: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x_t = Lambda x_{t-1} + u_t, token by token: what triton_s5_scan.py does in parallel.

    u (B, L, P) as [real | imaginary]; log_re, log_im (P/2,): log Lambda; initial_state (B, P), None for zero; begins
    (B, L) bool, where the state before the token counts as zero. Returns x (B, L, P) and the last state (B, P).
    """
    Lambda = torch.cat(powers(log_re, log_im, torch.ones((), device=u.device)), -1).to(u.dtype)
    x = torch.zeros_like(u[:, 0]) if initial_state is None else initial_state
    states = []
    for t, driven in enumerate(u.unbind(1)):
        if begins is not None:
            x = torch.where(begins[:, t, None], 0, x)
        x = apply_diagonal(Lambda, x) + driven
        states.append(x)
    return torch.stack(states, 1), x
