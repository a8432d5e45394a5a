"""What S4 and S4D share: single-input single-output systems, one a channel."""

import math

import torch

from .checks import check_sharing
from .chunked import ChunkOperators
from .discrete import per_channel
from .hippo import INITIALIZATIONS
from .ops import fft_convolution, siso_step
from .real_form import real_form
from .state_space import MIN_DECAY, StateSpace


class SingleInputSingleOutput(StateSpace):
    """S4 and S4D: every channel u(t) goes through a system of its own, with a step dt per channel,

        x' = A x + B u,   y = 2 Re(C x) + D u

    n_ssm: how many (A, B, P) there are, shared by the channels h with the same h mod n_ssm (None: one each).
    b_clip: largest |B_n| of the initialisation, the phase kept; upstream clamps Im(B), which in its eigenvectors'
    gauge is all of B for HiPPO-LegS. None: no limit.
    """

    def __init__(
        self,
        hidden_size: int,
        state_size: int = 64,
        init: str = "legs",
        discretization: str | None = None,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        n_ssm: int | None = None,
        chunk_size: int = 64,
        bidirectional: bool = False,
        b_clip: float | None = None,
    ):
        super().__init__(hidden_size, state_size, init, discretization, dt_min, dt_max, chunk_size, bidirectional)
        n_ssm = hidden_size if n_ssm is None else n_ssm
        check_sharing(hidden_size, n_ssm, b_clip)
        self.n_ssm, self.b_clip = n_ssm, b_clip
        half = state_size // 2
        self._declare(
            log_dt=(hidden_size,),
            Lambda_log_re=(n_ssm, half),  # Re Lambda = -exp(this) < 0
            Lambda_im=(n_ssm, half),
            B=(n_ssm, state_size),
            C=(hidden_size, state_size),
            D=(hidden_size,),
            **self._further_shapes(),
        )

    def _further_shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameters that a subclass has beyond these."""
        return {}

    def initial_values(self) -> dict[str, torch.Tensor]:
        """HiPPO for A, B (and P), dt log-uniform, C and D random."""
        start = INITIALIZATIONS[self.name][self.init](self.state_size)
        Lambda, B = torch.from_numpy(start.Lambda), torch.from_numpy(start.B)
        if self.b_clip is not None:
            B = B * (self.b_clip / B.abs()).clamp(max=1)
        values = {
            "log_dt": self._random_dt(),
            "Lambda_log_re": (-Lambda.real).clamp(min=MIN_DECAY).log().expand(self.n_ssm, -1),
            "Lambda_im": Lambda.imag.expand(self.n_ssm, -1),
            "B": real_form(B).expand(self.n_ssm, -1),
            # a complex normal of variance 1: half of it in each part
            "C": torch.randn(self.C.shape) * math.sqrt(0.5),
            "D": torch.randn(self.hidden_size),
        }
        if self.bidirectional:
            values["C_reverse"] = torch.randn(self.C.shape) * math.sqrt(0.5)
        return values

    def _per_channel(self, shared: torch.Tensor) -> torch.Tensor:
        return per_channel(shared, self.hidden_size)

    def time_constants(self):
        log_rate = getattr(self, "Lambda_log_re", None)
        return None if log_rate is None else (-self.log_dt[:, None] - self._per_channel(log_rate)).exp()

    def _system(self, reverse: bool) -> tuple[torch.Tensor, ...]:
        """What `_operators` are made of."""
        return self.discretize(reverse)

    def _operators(self, system: tuple, length: int, skip: torch.Tensor | None) -> ChunkOperators:
        """Those of a chunk, with skip in the first tap; None: without D."""
        raise NotImplementedError

    def operators(self, length: int, reverse: bool = False, skip: torch.Tensor | None = None) -> ChunkOperators:
        return self._operators(self._system(reverse), length, skip)

    def operators_with_skip(self, length):
        if type(self).operators is not SingleInputSingleOutput.operators:  # a subclass's own need not take a skip
            return super().operators_with_skip(length)
        return self.operators(length, skip=self.D)

    def step_on_kernel(self, u, state, coefficients, activation):
        return siso_step(u, state, *coefficients, self.D, activation)

    def convolve(self, signal, reverse):
        return fft_convolution(signal, self.kernel(signal.shape[1], reverse))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, n_ssm={self.n_ssm}, b_clip={self.b_clip}"
