"""SSD: the diagonal transition of S4D, a head instead of a channel, written and read by vectors of the token.

    S_t = a_t R(dt_t omega) S_(t-1) + dt_t b_t v_t^T,    y_t = S_t^T c_t + D v_t         a_t = exp(-dt_t exp(decay))

S_t (N, P) of a head with P channels; v_t (P,) its values; b_t and c_t (N,) the write and read vectors, which all heads
share; R turns the N/2 conjugate pairs by the angles dt_t omega, real form [real parts | imaginary parts]. One output
channel p of it is S4D with rates -exp(decay) + i omega, whose B and C are no longer parameters but the token's.

The step dt is a parameter a head, or, with `selective`, a function of the token: softplus(raw_t + softplus^-1(dt)).

In a chunk, with s_i = dt_1 + ... + dt_i and rows turned back to its start, b~_j = R(-s_j omega) b_j and c~ alike,

    y_i = sum_(j<=i) (c~_i . b~_j) exp(-(s_i - s_j) exp(decay)) dt_j v_j  +  exp(-s_i exp(decay)) c~_i^T S_0

which is attention with a decay for a mask (the "duality"), and a recurrence over the chunks: O(L), by matmuls.

Source: Dao and Gu, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space
Duality" (2024), section 6; the rotation by the frequencies of rotary embeddings (hippo.py), or by S4D-Lin's (Gu et al.
2022). b and c pass an RMS norm and get a bias that starts at 1, so that a head begins close to the time-invariant
system.
"""

import torch

from .checks import check_heads
from .discrete import DiscreteSSD, step_of_token
from .hippo import INITIALIZATIONS
from .kernel_limits import limit_of_rms_norm, limit_of_ssd_scan, longest_ssd_chunk
from .ops import SSD_SYSTEM, ssd_scan, ssd_step, ssd_vectors
from .state_space import MIN_DECAY, StateSpace


def channels_of_a_head(hidden_size: int, head_dim: int | None) -> int:
    """head_dim, or what stands for None: 64, or all channels where they are fewer."""
    return min(64, hidden_size) if head_dim is None else head_dim


class SSD(StateSpace):
    """hidden_size H, in heads of head_dim P channels; None: 64, or all of them where they are fewer; state_size
    N of a channel, even. A state is (B, H, N).

    Its input is wider than its output: [v (H) | b (N) | c (N)], with `selective` also one raw step a head, (H / P).
    """

    name = "ssd"
    has_chunk_kernel = False
    scan_library = "ssd"
    step_operation = "ssd_step"
    is_time_invariant = False

    def __init__(
        self,
        hidden_size: int,
        state_size: int = 64,
        init: str = "rope",
        discretization: str | None = None,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        chunk_size: int = 64,
        bidirectional: bool = False,
        head_dim: int | None = None,
        selective: bool = False,
    ):
        super().__init__(hidden_size, state_size, init, discretization, dt_min, dt_max, chunk_size, bidirectional)
        if bidirectional:
            raise ValueError("ssd reads its input from the front alone: bidirectional is for s4, s4d and s5")
        self.head_dim = channels_of_a_head(hidden_size, head_dim)
        check_heads(hidden_size, self.head_dim, "the channels of an ssd")
        self.heads, self.selective = hidden_size // self.head_dim, selective
        self._declare(
            log_dt=(self.heads,),
            Lambda_log_re=(self.heads,),  # the decay: Re Lambda = -exp(this) < 0
            Lambda_im=(self.heads, state_size // 2) if len(self.kinds) > 1 else (state_size // 2,),  # omega
            B_scale=(state_size,),
            B_bias=(state_size,),
            C_scale=(state_size,),
            C_bias=(state_size,),
            D=(hidden_size,),
        )

    def initial_values(self):
        """The first rate of a head's initialisation for its decay, all of the frequencies; scales and biases of 1."""
        Lambda = torch.stack([torch.from_numpy(kind(self.state_size).Lambda) for kind in self.kinds])
        of_heads = torch.arange(self.heads) % len(Lambda)
        ones = torch.ones(self.state_size)
        return {
            "log_dt": self._random_dt(),
            "Lambda_log_re": (-Lambda.real[of_heads, 0]).clamp(min=MIN_DECAY).log(),
            "Lambda_im": Lambda.imag[of_heads] if len(Lambda) > 1 else Lambda.imag[0],
            "B_scale": ones,
            "B_bias": ones,
            "C_scale": ones,
            "C_bias": ones,
            "D": torch.ones(self.hidden_size),
        }

    @property
    def kinds(self):
        """The initialisations that the heads take in turns; of one alone, the heads share the frequencies."""
        kinds = INITIALIZATIONS[self.name][self.init]
        return kinds if isinstance(kinds, tuple) else (kinds,)

    @property
    def unconvolved(self):
        """The raw steps."""
        return self.heads if self.selective else 0

    @property
    def input_size(self):
        return self.hidden_size + 2 * self.state_size + self.unconvolved

    def discretize(self, reverse=False) -> DiscreteSSD:
        """In float64 but for the norms of b and c."""
        system = self._without_transition()
        if self.selective:
            return system
        return system._replace(Lambda_bar=system.over(system.dt).to(self.log_dt.dtype))

    def _without_transition(self) -> DiscreteSSD:
        """The discrete system but for its transition over one token."""
        scale, bias = torch.stack([self.B_scale, self.C_scale]), torch.stack([self.B_bias, self.C_bias])
        dt, decay, omega, inverse = self._rates()
        return DiscreteSSD(dt, decay, omega, scale, bias, inverse, None)

    def _rates(self) -> tuple[torch.Tensor | None, ...]:
        """dt, decay, omega and inverse of a `DiscreteSSD`."""
        dt = self.log_dt.double().exp()
        inverse = dt + torch.log(-torch.expm1(-dt)) if self.selective else None
        return dt, self.Lambda_log_re.double().exp(), self.Lambda_im.double().expand(self.heads, -1), inverse

    # ---- what is scanned is the input itself

    def skipped(self, x):
        return x[..., : self.hidden_size]

    def run_chunk(self, x, state, documents, execution, reverse=False):
        begins = None if documents is None else documents.begins
        return self._scan(self._as_scanned(x, execution), state, begins, execution)

    def scan_to_end(self, x, state, execution):
        return self._scan(self._as_scanned(x, execution), state, None, execution, has_output=False)[1]

    def _as_scanned(self, x, execution):
        """The kernel takes tokens in bfloat16; without it all is in the dtype of the parameters."""
        return x if execution.kernel else x.to(self.log_dt.dtype)

    def _scan(self, x, state, begins, execution, has_output=True):
        T, (dt, decay, omega, inverse) = min(execution.chunk_size, x.shape[1]), self._rates()
        v, vectors, *raw = x.split([self.hidden_size, 2 * self.state_size, *[self.heads] * self.selective], -1)
        norms = self.B_scale, self.B_bias, self.C_scale, self.C_bias
        b, c = ssd_vectors(vectors, *norms, run_kernel=execution.kernel and self._norms_on_kernel(vectors))
        if self.selective:
            dt = step_of_token(raw[0], inverse)
        of_tokens, in_c = (v, b.to(v.dtype), c.to(v.dtype), dt), self.scans_this_in_c(v)
        return ssd_scan(execution.kernel, *of_tokens, decay, omega, self.D, state, begins, T, has_output, in_c)

    def _norms_on_kernel(self, vectors) -> bool:
        N, parameters = self.state_size, self.B_scale.dtype
        unsupported = limit_of_rms_norm(vectors.dtype, parameters, N)
        return SSD_SYSTEM.runs_kernel(
            vectors, self.B_scale, unsupported=unsupported, setting=self.kernels, problem=(vectors.dtype, parameters, N)
        )

    def transition(self, length):
        """(H, N); ValueError with `selective`, where `transition_over` has it."""
        if self.selective:
            raise ValueError("the transition of an ssd with selective_dt depends on its input")
        system = self._without_transition()
        return system.over(system.dt * length).repeat_interleave(self.head_dim, 0).to(self.log_dt.dtype)

    def transition_over(self, u):
        """(H, N), or (B, H, N) with `selective`."""
        if not self.selective:
            return self.transition(u.shape[1])
        system = self._without_transition()
        total = step_of_token(u[..., -self.heads :].to(self.log_dt.dtype), system.inverse).sum(1)
        return system.over(total).repeat_interleave(self.head_dim, 1).to(self.log_dt.dtype)

    def convolve(self, signal, reverse):
        raise ValueError("mode fft is for time-invariant layers, not for ssd")

    def scan_kernel(self, architecture, dtype):
        unsupported = limit_of_ssd_scan(architecture, dtype, self.state_size)
        chunk_size = self.chunk_on_kernel(architecture, dtype)
        return "ssd_scan", unsupported, (dtype, self.head_dim, self.state_size, chunk_size)

    def longest_chunk(self, architecture, dtype):
        return longest_ssd_chunk(architecture, dtype, self.state_size)

    def step_on_kernel(self, u, state, coefficients, activation):
        return ssd_step(u, state, *coefficients, self.D, activation)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, head_dim={self.head_dim}, selective={self.selective}"
