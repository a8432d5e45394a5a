"""S4 and S4D: parameters -> operators, kernel, step.

A layer maps every channel u(t) of its input through its own single-input single-output system

    x' = A x + B u,   y = 2 Re(C x) + D u          A = diag(Lambda) - P P^*  (S4),   A = diag(Lambda)  (S4D)

discretised with a step dt per channel. The system is real of order N, so its states come in conjugate pairs; N/2 of
them are kept, as real numbers [real parts | imaginary parts], which makes the state a real vector of length N.

Three ways to run it agree to rounding:
    chunk      matmuls within chunks of T tokens and a recurrence over the chunks: O(L)
    fft        the kernel of the whole length, then an FFT convolution: O(L log L), the paper's training mode
    recurrent  one token after the other: O(1) memory a token, for generation

Parameters are real tensors: complex ones break optimizers, collectives and safetensors. They stay float32 (or
float64) whatever dtype the model is moved to or autocast to, and so do operators and states: dt and Lambda need the
exponent and the digits.

Sources: S4, Gu et al. 2022 (DPLR, bilinear, Cauchy kernel, Woodbury step); S4D, Gu et al. 2022 (diagonal, ZOH).
"""

import math
from typing import NamedTuple

import torch
from torch import nn

from .hippo import INITIALIZATIONS
from .ops import (
    ChunkOperators,
    apply_diagonal,
    cauchy,
    chunk_scan,
    chunk_states,
    fft_convolution,
    powers,
    to_chunks,
    vandermonde,
)

MODES = ("auto", "chunk", "fft", "recurrent")
DISCRETIZATIONS = {"s4": ("bilinear",), "s4d": ("zoh", "bilinear")}  # the first is the default

# upstream's floor under |Re Lambda|; it keeps an initialisation on the imaginary axis strictly stable
MIN_DECAY = 1e-4


def real_form(z: torch.Tensor) -> torch.Tensor:
    """(..., N/2) complex -> (..., N) real, [real parts | imaginary parts]."""
    return torch.cat([z.real, z.imag], -1)


def complex_product(a: tuple, b: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    """(re, im) times (re, im)."""
    return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]


class StateSpace(nn.Module):
    """What S4 and S4D share: parameters, dtype policy, and the three modes.

    hidden_size H; state_size N, even; chunk_size T of the chunk mode; n_ssm: how many (A, B, P) there are, shared by
    the channels h with the same h mod n_ssm (None: one each).
    """

    name: str  # as in S4Config.ssm
    # below this length the FFT convolution, with its kernel, takes less time than the chunk scan (forward and
    # backward, measured on a CPU); 0: never, a DPLR kernel costs more than the scan at every length
    fft_is_faster_below = 0

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
    ):
        super().__init__()
        discretization = discretization or DISCRETIZATIONS[self.name][0]
        for key, value, known in (
            ("init", init, INITIALIZATIONS[self.name]),
            ("discretization", discretization, DISCRETIZATIONS[self.name]),
        ):
            if value not in known:
                raise ValueError(f"{key} of {self.name} is one of {', '.join(known)}, not {value!r}")
        if state_size < 2 or state_size % 2:
            raise ValueError(f"state_size counts real states in conjugate pairs: even and at least 2, not {state_size}")
        n_ssm = hidden_size if n_ssm is None else n_ssm
        if n_ssm < 1 or hidden_size % n_ssm:
            raise ValueError(f"n_ssm must divide hidden_size ({hidden_size}), and {n_ssm} does not")
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"0 < dt_min <= dt_max is needed, not dt_min={dt_min}, dt_max={dt_max}")
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be positive, not {chunk_size}")
        self.hidden_size, self.state_size, self.n_ssm = hidden_size, state_size, n_ssm
        self.init, self.discretization = init, discretization
        self.dt_min, self.dt_max = dt_min, dt_max
        self.chunk_size = chunk_size

        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        half = state_size // 2
        self.log_dt = nn.Parameter(torch.empty(hidden_size, dtype=dtype))
        self.Lambda_log_re = nn.Parameter(torch.empty(n_ssm, half, dtype=dtype))  # Re Lambda = -exp(this) < 0
        self.Lambda_im = nn.Parameter(torch.empty(n_ssm, half, dtype=dtype))
        self.B = nn.Parameter(torch.empty(n_ssm, state_size, dtype=dtype))
        self.C = nn.Parameter(torch.empty(hidden_size, state_size, dtype=dtype))
        self.D = nn.Parameter(torch.empty(hidden_size, dtype=dtype))
        self._add_parameters(dtype)
        if not self.log_dt.is_meta:
            for parameter, value in self.initial_values().items():
                getattr(self, parameter).data.copy_(value)

    def _add_parameters(self, dtype: torch.dtype) -> None:
        """Further parameters of a subclass."""

    def initial_values(self) -> dict[str, torch.Tensor]:
        """Fresh values for every parameter, by name: HiPPO for A, B (and P), dt log-uniform, C and D random."""
        start = INITIALIZATIONS[self.name][self.init](self.state_size)
        Lambda = torch.from_numpy(start.Lambda)
        values = {
            "log_dt": torch.empty(self.hidden_size).uniform_(math.log(self.dt_min), math.log(self.dt_max)),
            "Lambda_log_re": (-Lambda.real).clamp(min=MIN_DECAY).log().expand(self.n_ssm, -1),
            "Lambda_im": Lambda.imag.expand(self.n_ssm, -1),
            "B": real_form(torch.from_numpy(start.B)).expand(self.n_ssm, -1),
            # a complex normal of variance 1: half of it in each part
            "C": torch.randn(self.hidden_size, self.state_size) * math.sqrt(0.5),
            "D": torch.randn(self.hidden_size),
        }
        return values

    def _apply(self, fn, recurse=True):
        """Let a move of the module change the device, or go to float64, but never below float32."""

        def keep_precision(tensor):
            moved = fn(tensor)
            if moved.is_floating_point() and moved.dtype in (torch.float16, torch.bfloat16):
                return tensor.to(moved.device)
            return moved

        return super()._apply(keep_precision, recurse)

    # ---- parameters -> system

    def _per_channel(self, shared: torch.Tensor) -> torch.Tensor:
        """(..., n_ssm, k) -> (..., H, k): channel h takes copy h mod n_ssm."""
        if self.n_ssm == self.hidden_size:
            return shared
        if self.n_ssm == 1:
            return shared.expand(*shared.shape[:-2], self.hidden_size, -1)
        return shared.repeat(*[1] * (shared.dim() - 2), self.hidden_size // self.n_ssm, 1)

    def _dt_Lambda(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """dt (H, 1), and Re and Im of dt Lambda, (H, N/2) each."""
        dt = self.log_dt.exp()[:, None]
        return dt, -dt * self._per_channel(self.Lambda_log_re.exp()), dt * self._per_channel(self.Lambda_im)

    def discretize(self) -> tuple:
        """The discrete system, in the form that `_advance` takes."""
        raise NotImplementedError

    def _advance(self, discrete: tuple, u: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One token: u (B, H), state (B, H, N) -> y (B, H) without D u, next state."""
        raise NotImplementedError

    def operators(self, length: int) -> ChunkOperators:
        """The four operators of a chunk of `length` tokens; see `ops.ChunkOperators`."""
        raise NotImplementedError

    def kernel(self, length: int) -> torch.Tensor:
        """K (H, L): y = causal convolution of u with K, plus D u."""
        raise NotImplementedError

    # ---- the three modes

    def zero_state(self, batch_size: int, device=None) -> torch.Tensor:
        """(B, H, N), in the dtype of the parameters."""
        return torch.zeros(
            batch_size, self.hidden_size, self.state_size, dtype=self.log_dt.dtype, device=device or self.log_dt.device
        )

    def forward(
        self,
        u: torch.Tensor,
        mode: str = "auto",
        initial_state: torch.Tensor | None = None,
        output_final_state: bool = True,
        memo: dict | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the layer over a sequence.

        u: (B, L, H), any floating dtype, any L; y comes back in the same dtype.
        mode: "chunk", "fft", "recurrent"; "auto" takes the one that was measured to be the fastest.
        initial_state: (B, H, N) or None for zero. The final state is float32 (float64 for a float64 layer), or None
        where output_final_state is False. Both are differentiable.
        memo: a dict of the caller's that keeps the discretised system between calls while the parameters stay the
        same; used by the recurrent mode.
        Raises ValueError for another mode or shape.
        """
        if mode not in MODES:
            raise ValueError(f"mode is one of {', '.join(MODES)}, not {mode!r}")
        if u.dim() != 3 or u.shape[-1] != self.hidden_size:
            raise ValueError(f"u must be (batch, length, {self.hidden_size}), not {tuple(u.shape)}")
        B, L, H = u.shape
        expected = (B, H, self.state_size)
        if initial_state is not None and tuple(initial_state.shape) != expected:
            raise ValueError(f"initial_state must be {expected}, not {tuple(initial_state.shape)}")

        with torch.autocast(u.device.type, enabled=False):
            x = u.to(self.log_dt.dtype)
            state = None if initial_state is None else initial_state.to(x.dtype)
            if mode == "auto":
                mode = self._fastest_mode(L, needs_state=state is not None or output_final_state)
            if x.numel() == 0:
                y, state = x, state if state is not None else self.zero_state(B, x.device)
            elif mode == "recurrent":
                y, state = self._run_recurrent(x, state, memo)
            elif mode == "fft":
                y, state = self._run_fft(x, state, output_final_state)
            else:
                y, state = self._run_chunk(x, state)
            y = torch.addcmul(y, x, self.D)
        return y.to(u.dtype), state if output_final_state else None

    def _fastest_mode(self, length: int, needs_state: bool) -> str:
        if length == 1:
            return "recurrent"
        return "fft" if length < self.fft_is_faster_below and not needs_state else "chunk"

    def step(self, u: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One token: u (B, H), state (B, H, N) -> y (B, H), next state."""
        y, state = self(u[:, None], mode="recurrent", initial_state=state)
        return y[:, 0], state

    def _run_recurrent(self, x, state, memo):
        memo = {} if memo is None else memo
        if "discrete" not in memo:
            memo["discrete"] = self.discretize()
        state = self.zero_state(x.shape[0], x.device) if state is None else state
        outputs = []
        for u in x.unbind(1):
            y, state = self._advance(memo["discrete"], u, state)
            outputs.append(y)
        return torch.stack(outputs, 1), state

    def _run_chunk(self, x, state):
        state = self.zero_state(x.shape[0], x.device) if state is None else state
        outputs = []
        # whole chunks first; what is left is one chunk of its own length, so any length is exact
        for part, T in self._parts(x):
            y, state = chunk_scan(part, self.operators(T), state)
            outputs.append(y)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1), state

    def _run_fft(self, x, state, output_final_state):
        y = fft_convolution(x, self.kernel(x.shape[1]))
        if state is not None:
            # by linearity the initial state adds what it would emit under a zero input
            y = y + self._run_chunk(torch.zeros_like(x), state)[0]
        if output_final_state:
            state = self.zero_state(x.shape[0], x.device) if state is None else state
            for part, T in self._parts(x):
                state = chunk_states(to_chunks(part, T), self.operators(T), state)[-1].transpose(0, 1)
        return y, state

    def _parts(self, x):
        """Cut x (B, L, H) into a run of whole chunks and the ragged rest: [(part, chunk length)]."""
        T = min(self.chunk_size, x.shape[1])
        whole = x.shape[1] // T * T
        parts = [(x[:, :whole], T)]
        if whole < x.shape[1]:
            parts.append((x[:, whole:], x.shape[1] - whole))
        return parts

    def extra_repr(self) -> str:
        return (
            f"hidden_size={self.hidden_size}, state_size={self.state_size}, init={self.init}, "
            f"discretization={self.discretization}, n_ssm={self.n_ssm}, chunk_size={self.chunk_size}"
        )


class DiscreteDPLR(NamedTuple):
    """The bilinear transform of a diagonal plus low-rank system is one again:

        h_t = (R(E) - F G^T) h_{t-1} + B_bar u_t,   y_t = C_row h_t      R(E): complex product by E, in real form

    E (H, N), B_bar (H, N), C_row (H, N), F and G (H, N, rank).
    """

    E: torch.Tensor
    F: torch.Tensor
    G: torch.Tensor
    B_bar: torch.Tensor
    C_row: torch.Tensor


class S4(StateSpace):
    """S4: A = diag(Lambda) - P P^*, bilinear. P = Q and Re Lambda < 0 by construction, so that A + A^* < 0 and the
    discrete system is stable whatever training does (Goel et al., "It's Raw!", 2022).
    """

    name = "s4"

    def _add_parameters(self, dtype):
        self.rank = len(INITIALIZATIONS[self.name][self.init](self.state_size).P)
        self.P = nn.Parameter(torch.empty(self.rank, self.n_ssm, self.state_size, dtype=dtype))

    def initial_values(self):
        P = torch.from_numpy(INITIALIZATIONS[self.name][self.init](self.state_size).P)
        return super().initial_values() | {"P": real_form(P)[:, None].expand(-1, self.n_ssm, -1)}

    def _C_row(self) -> torch.Tensor:
        """C as a row on the real state: y = 2 Re(C x) = [2 Re C | -2 Im C] . [Re x | Im x]. (H, N)"""
        C_re, C_im = self.C.chunk(2, -1)
        return 2 * torch.cat([C_re, -C_im], -1)

    def discretize(self) -> DiscreteDPLR:
        """A_bar = (I - dt/2 A)^-1 (I + dt/2 A) and B_bar = (I - dt/2 A)^-1 dt B by the Woodbury identity, O(N).

        In real form A = R(Lambda) - 2 p p^T with p = [Re P | Im P]. With w = 1 / (1 - dt Lambda / 2),
            (I - dt/2 A)^-1 = R(w) - dt (w P) M (P conj w)^T,   M = (I + dt p^T R(w) p)^-1
        and A_bar = 2 (I - dt/2 A)^-1 - I.
        """
        dt, a, b = self._dt_Lambda()
        scale = 1 / ((1 - a / 2) ** 2 + (b / 2) ** 2)
        w = ((1 - a / 2) * scale, (b / 2) * scale)
        P = self._per_channel(self.P).chunk(2, -1)  # (rank, H, N/2) each
        B = self._per_channel(self.B).chunk(2, -1)
        wP = torch.cat(complex_product(w, P), -1)
        wB = torch.cat(complex_product(w, B), -1)
        G = torch.cat(complex_product((w[0], -w[1]), P), -1).permute(1, 2, 0)  # (H, N, rank)
        p = torch.cat(P, -1)
        capacitance = torch.einsum("rhn,shn->hrs", p, wP) * dt[..., None]
        capacitance = capacitance + torch.eye(self.rank, dtype=dt.dtype, device=dt.device)
        # rank 1, HiPPO-LegS, is a division; inv_ex does not wait for the device to say whether it worked
        M = 1 / capacitance if self.rank == 1 else torch.linalg.inv_ex(capacitance).inverse
        wPM = dt[..., None] * torch.einsum("rhn,hrs->hns", wP, M)  # (H, N, rank)
        B_bar = dt * (wB - torch.einsum("hnr,rhm,hm->hn", wPM, p, wB))
        E = torch.cat([2 * w[0] - 1, 2 * w[1]], -1)
        return DiscreteDPLR(E, 2 * wPM, G, B_bar, self._C_row())

    def _advance(self, discrete, u, state):
        E, F, G, B_bar, C_row = discrete
        low_rank = torch.einsum("hnr,bhr->bhn", F, torch.einsum("hnr,bhn->bhr", G, state))
        state = apply_diagonal(E, state) - low_rank + B_bar * u[..., None]
        return (state * C_row).sum(-1), state

    def _dense(self, discrete: DiscreteDPLR) -> torch.Tensor:
        """A_bar, (H, N, N)."""
        e_re, e_im = (torch.diag_embed(part) for part in discrete.E.chunk(2, -1))
        rotation = torch.cat([torch.cat([e_re, -e_im], -1), torch.cat([e_im, e_re], -1)], -2)
        return rotation - discrete.F @ discrete.G.transpose(1, 2)

    def operators(self, length: int) -> ChunkOperators:
        """Krylov columns A^j B and rows C A^(j+1) by doubling: log2(T) squarings of the dense real A_bar."""
        discrete = self.discretize()
        power = self._dense(discrete)  # A^(2^k)
        columns = discrete.B_bar[..., None]  # A^j B, j = 0, 1, ...
        rows = discrete.C_row[:, None] @ power  # C A^(j+1)
        carry = None  # A^length, from the binary digits of the length
        remaining = length
        while True:
            if remaining & 1:
                carry = power if carry is None else power @ carry
            remaining >>= 1
            if not remaining:
                break
            missing = length - columns.shape[-1]
            columns = torch.cat([columns, power @ columns[..., :missing]], -1)
            rows = torch.cat([rows, rows[:, :missing] @ power], 1)
            power = power @ power
        missing = length - columns.shape[-1]
        if missing:
            columns = torch.cat([columns, power @ columns[..., :missing]], -1)
            rows = torch.cat([rows, rows[:, :missing] @ power], 1)
        taps = (discrete.C_row[:, None] @ columns).squeeze(1)
        return ChunkOperators(taps, rows, columns.flip(-1), carry)

    def kernel(self, length: int) -> torch.Tensor:
        """K (H, L) by the Cauchy kernel: the truncated generating function of the taps at the L-th roots of unity.

        At z = exp(-2 pi i k / L):  2/(1+z) = 1 + i t  and  2 (1-z)/(1+z) = 2 i t  with  t = tan(pi k / L), so
            K^(z) = (1 + i t) C~ (2 i t - dt A)^-1 dt B,    C~ = C (I - A_bar^L)
        and Woodbury turns the inverse into Cauchy products. t is computed in float64 (powers of a float32 root of
        unity lose two digits at L = 8192); at Nyquist, where t is infinite, K^ = dt C~ B / 2.
        """
        dt, a, b = self._dt_Lambda()
        C_tilde = self._truncated_C(length)
        C = (C_tilde[..., : self.state_size // 2] / 2, -C_tilde[..., self.state_size // 2 :] / 2)
        B = self._per_channel(self.B).chunk(2, -1)
        P = self._per_channel(self.P).chunk(2, -1)
        P_conj = (P[0], -P[1])

        # rows [C~; P^*] times columns [B, P]: (1 + rank)^2 Cauchy products at once
        left = [torch.cat([c[None], p]) for c, p in zip(C, P_conj, strict=True)]
        right = [torch.cat([c[None], p]) for c, p in zip(B, P, strict=True)]
        pairs = complex_product([x[:, None] for x in left], [x[None] for x in right])
        v_re, v_im = (x.flatten(0, 1).transpose(0, 1) for x in pairs)  # (H, (1+rank)^2, N/2)

        k = torch.arange((length + 1) // 2, device=dt.device)  # without Nyquist
        t = torch.tan(torch.pi * k.double() / length).to(dt.dtype)
        r = torch.complex(*cauchy(v_re, v_im, 2 * t, a, b))
        r = r.view(self.hidden_size, 1 + self.rank, 1 + self.rank, -1)
        dt_r = dt[..., None]
        r00, r01, r10, r11 = r[:, 0, 0], r[:, 0, 1:], r[:, 1:, 0], r[:, 1:, 1:]
        if self.rank == 1:
            correction = dt * (r01 * r10)[:, 0] / (1 + dt * r11[:, 0, 0])
        else:
            eye = torch.eye(self.rank, dtype=r.dtype, device=r.device)
            M = torch.linalg.inv_ex(eye + dt_r[..., None] * r11.permute(0, 3, 1, 2)).inverse
            correction = dt * torch.einsum("hrl,hlrs,hsl->hl", r01, M, r10)
        spectrum = torch.complex(torch.ones_like(t), t) * dt * (r00 - correction)
        if length % 2 == 0:
            # sum over the conjugate pairs: 2 Re
            nyquist = dt * (C[0] * B[0] - C[1] * B[1]).sum(-1, keepdim=True)
            spectrum = torch.cat([spectrum, nyquist.to(spectrum.dtype)], -1)
        return torch.fft.irfft(spectrum, n=length)

    def _truncated_C(self, length: int) -> torch.Tensor:
        """C (I - A_bar^L) as a row on the real state, (H, N): makes the generating function end after L taps."""
        discrete = self.discretize()
        power, row = self._dense(discrete), discrete.C_row[:, None]
        remaining = length
        while remaining:
            if remaining & 1:
                row = row @ power
            remaining >>= 1
            if remaining:
                power = power @ power
        return discrete.C_row - row.squeeze(1)


class DiscreteDiagonal(NamedTuple):
    """x_t = Lambda_bar x_{t-1} + u_t,  y_t = 2 Re(CB x_t): B_bar is folded into C, so that u itself drives the state.

    log_re, log_im: log Lambda_bar, float64; CB_re, CB_im: C B_bar. All (H, N/2).
    Lambda_bar, row: the same as real vectors (H, N) for one step.
    """

    log_re: torch.Tensor
    log_im: torch.Tensor
    CB_re: torch.Tensor
    CB_im: torch.Tensor
    Lambda_bar: torch.Tensor
    row: torch.Tensor


class S4D(StateSpace):
    """S4D: A = diag(Lambda), zero-order hold or bilinear."""

    name = "s4d"
    fft_is_faster_below = 2048

    def discretize(self) -> DiscreteDiagonal:
        """zoh:       Lambda_bar = exp(dt Lambda),                     B_bar = (Lambda_bar - 1) / Lambda B
        bilinear:  Lambda_bar = (1 + dt Lambda/2)/(1 - dt Lambda/2),  B_bar = dt / (1 - dt Lambda/2) B

        In float64: the angle dt Im(Lambda) is many turns, and what is left of it after them must keep its digits.
        """
        dtype = self.log_dt.dtype
        dt = self.log_dt.double().exp()[:, None]
        a = -dt * self._per_channel(self.Lambda_log_re.double().exp())
        b = dt * self._per_channel(self.Lambda_im.double())
        Lambda = (a / dt, b / dt)
        if self.discretization == "zoh":
            log = (a, b)
            # (exp(z) - 1) / Lambda with z = a + i b, free of cancellation for small z:
            # exp(z) - 1 = expm1(a) cos b + (cos b - 1) + i exp(a) sin b, and cos b - 1 = -2 sin^2(b/2)
            numerator = (torch.expm1(a) * torch.cos(b) - 2 * torch.sin(b / 2) ** 2, torch.exp(a) * torch.sin(b))
            denominator = Lambda
        else:
            plus, minus = 1 + a / 2, 1 - a / 2
            # at a = -2, b = 0 Lambda_bar is zero; the floor stands for its logarithm
            modulus = (plus**2 + (b / 2) ** 2).clamp(min=1e-300) / (minus**2 + (b / 2) ** 2)
            log = (0.5 * modulus.log(), torch.atan2(b / 2, plus) + torch.atan2(b / 2, minus))
            numerator, denominator = (dt, torch.zeros_like(b)), (minus, -b / 2)
        scale = 1 / (denominator[0] ** 2 + denominator[1] ** 2)
        inverse = (denominator[0] * scale, -denominator[1] * scale)
        B_bar = complex_product(complex_product(numerator, inverse), self._per_channel(self.B.double()).chunk(2, -1))
        CB = [part.to(dtype) for part in complex_product(self.C.double().chunk(2, -1), B_bar)]
        Lambda_bar = torch.cat(powers(*log, torch.ones((), device=dt.device)), -1).to(dtype)
        return DiscreteDiagonal(*log, *CB, Lambda_bar, 2 * torch.cat([CB[0], -CB[1]], -1))

    def _advance(self, discrete, u, state):
        state = apply_diagonal(discrete.Lambda_bar, state)
        drive = u[..., None]
        half = self.state_size // 2
        state = torch.cat([state[..., :half] + drive, state[..., half:]], -1)
        return (state * discrete.row).sum(-1), state

    def operators(self, length: int) -> ChunkOperators:
        discrete = self.discretize()
        dtype = self.log_dt.dtype
        exponents = torch.arange(length + 1, device=discrete.log_re.device)
        re, im = powers(discrete.log_re[..., None], discrete.log_im[..., None], exponents)
        re, im = re.to(dtype), im.to(dtype)  # (H, N/2, T + 1)
        inject = torch.cat([re, im], 1)[..., :length].flip(-1)  # Lambda^(T-1-j)
        carry = torch.cat([re[..., -1], im[..., -1]], -1)
        c_re, c_im = discrete.CB_re[..., None], discrete.CB_im[..., None]
        rows = 2 * torch.cat([c_re * re - c_im * im, -(c_re * im + c_im * re)], 1)  # 2 Re(c Lambda^j x), j <= T
        taps = rows[:, : self.state_size // 2, :length].sum(1)
        return ChunkOperators(taps, rows[..., 1:].transpose(1, 2), inject, carry)

    def kernel(self, length: int) -> torch.Tensor:
        discrete = self.discretize()
        return vandermonde(discrete.CB_re, discrete.CB_im, discrete.log_re, discrete.log_im, length)


LAYERS = {"s4": S4, "s4d": S4D}
