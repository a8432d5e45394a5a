"""S5: one diagonal state space with many inputs and many outputs.

    x' = diag(Lambda) x + B u,   y = 2 Re(C x) + D u          x (P/2,) complex, u and y (H,) real

P = state_size is the order of the real system; its P/2 conjugate pairs are kept. Between the two dense matrices B and
C every state runs on its own, as a one-dimensional complex recurrence x_t = Lambda_bar x_(t-1) + (B_bar u)_t.

Source: Smith, Warrington, Linderman, "Simplified State Space Layers for Sequence Modeling" (2023).
"""

import math

import torch

from .checks import check_blocks
from .chunked import ChunkOperators
from .discrete import DiscreteMIMO
from .hippo import INITIALIZATIONS
from .kernel_limits import limit_of_s5_scan
from .ops import associative_scan, mimo_step, s5_scan, state_system
from .real_form import complex_product, powers, real_form
from .state_space import MIN_DECAY, StateSpace


class S5(StateSpace):
    """hidden_size H; state_size P, of the whole layer; blocks J: Lambda starts as J copies of the HiPPO-N spectrum of
    order P / J. zero-order hold or bilinear, a step dt per state.

    A state is (batch, 1, P), one "channel" of order P, as [real parts | imaginary parts].
    """

    name = "s5"
    has_chunk_kernel = False  # its signals are complex, which is another kernel: S5's scan
    scan_library = None  # its states meet

    def __init__(
        self,
        hidden_size: int,
        state_size: int = 64,
        init: str = "legs",
        discretization: str | None = None,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        blocks: int = 1,
        chunk_size: int = 64,
        bidirectional: bool = False,
    ):
        super().__init__(hidden_size, state_size, init, discretization, dt_min, dt_max, chunk_size, bidirectional)
        check_blocks(state_size, blocks)
        self.blocks = blocks
        half = state_size // 2
        self._declare(
            log_dt=(half,),
            Lambda_log_re=(half,),  # Re Lambda = -exp(this) < 0
            Lambda_im=(half,),
            B=(hidden_size, state_size),
            C=(hidden_size, state_size),
            D=(hidden_size,),
        )

    def initial_values(self):
        """Lambda block-diagonal HiPPO-N; B of variance 1/H and C of variance 1, complex normal.

        The paper draws B and C in the basis of HiPPO-N and turns them into that of its eigenvectors, which are
        orthonormal: independent normal numbers stay so, and they can be drawn in the eigenbasis directly.
        """
        start = INITIALIZATIONS[self.name][self.init](self.state_size // self.blocks)
        Lambda = torch.from_numpy(start.Lambda).repeat(self.blocks)
        values = {
            "log_dt": self._random_dt(),
            "Lambda_log_re": (-Lambda.real).clamp(min=MIN_DECAY).log(),
            "Lambda_im": Lambda.imag,
            "B": torch.randn(self.B.shape) * math.sqrt(0.5 / self.hidden_size),
            "C": torch.randn(self.C.shape) * math.sqrt(0.5),
            "D": torch.randn(self.hidden_size),
        }
        if self.bidirectional:
            values["C_reverse"] = torch.randn(self.C.shape) * math.sqrt(0.5)
        return values

    def _discrete_Lambda(self) -> tuple[tuple, tuple]:
        """log Lambda_bar, float64, and B_bar / B, pairs (re, im) of (P/2,)."""
        parameters = self.log_dt, self.Lambda_log_re, self.Lambda_im
        return state_system(*parameters, self.discretization, setting=self.kernels)

    def discretize(self, reverse=False) -> DiscreteMIMO:
        log, factor = self._discrete_Lambda()
        one = torch.ones((), device=self.log_dt.device)
        Lambda_bar = torch.cat(powers(*log, one), -1).to(self.log_dt.dtype)
        return DiscreteMIMO(*log, Lambda_bar, self._B_bar(factor), self._C_row(reverse))

    def transition(self, length):
        """(P,)"""
        log, _ = self._discrete_Lambda()
        return torch.cat(powers(*log, torch.tensor(length, device=self.log_dt.device)), -1).to(self.log_dt.dtype)

    def _B_bar(self, factor: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """(H, P) of B_bar / B."""
        factor = [part.to(self.B.dtype) for part in factor]
        return torch.cat(complex_product(factor, self.B.chunk(2, -1)), -1)

    def _C_row(self, reverse: bool) -> torch.Tensor:
        """y = 2 Re(C x) = [Re x | Im x] [2 Re C | -2 Im C]^T. (P, H)"""
        C_re, C_im = self._C(reverse).chunk(2, -1)
        return 2 * torch.cat([C_re, -C_im], -1).T

    # ---- its kernels

    @property
    def step_state_size(self):
        return 0  # many programs share the states

    def step_on_kernel(self, u, state, coefficients, activation):
        return mimo_step(u, state, *coefficients, self.D, activation)

    def scan_dtype(self, dtype):
        return self.log_dt.dtype

    def kernel_dtype(self, dtype):
        """As other layers' scans, unless a subclass has parts of its own, which know float32."""
        parts = ("scan_dtype", "drive", "read")
        is_own = any(getattr(type(self), name) is not getattr(S5, name) for name in parts)
        return self.scan_dtype(dtype) if is_own else super().scan_dtype(dtype)

    def scan_kernel(self, architecture, dtype):
        return "s5_scan", limit_of_s5_scan(dtype), ()

    def run_chunk(self, x, state, documents, execution, reverse=False):
        """On a GPU, the scan of its own kernel, which knows documents without moving them apart."""
        if not execution.kernel:
            return super().run_chunk(x, state, documents, execution, reverse)
        log, factor = self._discrete_Lambda()
        begins = None if documents is None else documents.begins
        signal = self._driven(x, factor) if type(self).drive is S5.drive else self.drive(x)
        signal, final = s5_scan(signal, *log, None if state is None else state[:, 0], begins)
        return self.read(signal, x, skipped=True, reverse=reverse), final[:, None]

    def scan_to_end(self, x, state, execution):
        if not execution.kernel:
            return super().scan_to_end(x, state, execution)
        return self.run_chunk(x, state, None, execution)[1]

    # ---- what is scanned: B_bar u, P/2 complex signals as [real | imaginary], which become the states themselves

    @property
    def state_shape(self):
        return 1, self.state_size

    def drive(self, x):
        return self._driven(x, self._discrete_Lambda()[1])

    def _driven(self, x, factor):
        return x @ self._B_bar(factor).to(x.dtype)

    def read(self, signal, x, skipped, reverse):
        y = signal @ self._C_row(reverse).to(signal.dtype)
        return y if reverse else torch.addcmul(y, x, self.D.to(y.dtype))

    def with_skip(self, operators):
        return operators  # D does not belong to a state

    def to_scan_state(self, state):
        return state.view(state.shape[0], 2, -1).transpose(1, 2)  # (B, P/2, 2)

    def from_scan_state(self, state):
        return state.transpose(1, 2).flatten(1)[:, None]

    def operators(self, length: int, reverse: bool = False) -> ChunkOperators:
        """Those of P/2 complex signals with one state each, which is the output: taps and all else are powers."""
        log, _ = self._discrete_Lambda()
        exponents = torch.arange(length + 1, device=self.log_dt.device)
        re, im = (x.to(self.log_dt.dtype) for x in powers(log[0][:, None], log[1][:, None], exponents))  # (P/2, T + 1)
        taps = torch.stack([re, im], 1)[..., :length]
        emit = _as_rotation(re[:, 1:, None], im[:, 1:, None])  # Lambda^(i+1)
        inject = _as_rotation(re[:, None, :length].flip(-1), im[:, None, :length].flip(-1))  # Lambda^(T-1-j)
        return ChunkOperators(taps, emit, inject, torch.stack([re[:, -1], im[:, -1]], -1))

    def convolve(self, signal, reverse):
        """Every state's recurrence as the convolution with its powers."""
        L = signal.shape[1]
        log, _ = self._discrete_Lambda()
        exponents = torch.arange(L, device=signal.device)
        kernel = torch.complex(*(x.to(signal.dtype) for x in powers(log[0][:, None], log[1][:, None], exponents)))
        drive = torch.complex(*signal.transpose(1, 2).chunk(2, 1))  # (B, P/2, L)
        size = 1 << (2 * L - 1).bit_length()
        states = torch.fft.ifft(torch.fft.fft(drive, n=size) * torch.fft.fft(kernel, n=size))[..., :L]
        return real_form(states.transpose(1, 2))

    def associative_scan(self, signal, reverse):
        log, _ = self._discrete_Lambda()
        return associative_scan(*log, signal)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, blocks={self.blocks}"


def _as_rotation(re: torch.Tensor, im: torch.Tensor) -> torch.Tensor:
    """Complex (..., a, b) -> real (..., 2a, 2b): the complex product on [real parts | imaginary parts]."""
    return torch.cat([torch.cat([re, -im], -1), torch.cat([im, re], -1)], -2)
