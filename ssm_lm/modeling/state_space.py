"""StateSpace: what S4, S4D and S5 share: parameters, dtype policy, and the three ways to run.

A layer is a linear time-invariant system with a real state. Complex states come in conjugate pairs; one of each pair
is kept, as real numbers [real parts | imaginary parts], which makes the state a real vector of length N.

Three ways to run it agree to rounding:
    chunk      matmuls within chunks of T tokens and a recurrence over the chunks: O(L)
    fft        the kernel of the whole length, then an FFT convolution: O(L log L), the papers' training mode
    recurrent  one token after the other: O(1) memory a token, for generation

Parameters are real tensors: complex ones break optimizers, collectives and safetensors. They stay float32 (or
float64) whatever dtype the model is moved to or autocast to, and so do operators and states: dt and Lambda need the
exponent and the digits.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from .activations import FUSED_ACTIVATIONS
from .chunked import ChunkOperators, chunk_scan, longest_chunk, unsupported_by_kernel
from .documents import Documents, find_documents, move_apart, move_together
from .hippo import INITIALIZATIONS
from .ops import apply_diagonal, fft_convolution, use_kernel

MODES = ("auto", "chunk", "fft", "recurrent", "associative")
DISCRETIZATIONS = {"s4": ("bilinear",), "s4d": ("zoh", "bilinear"), "s5": ("zoh", "bilinear")}  # [0]: the default

MAX_STEP_STATE = 1024  # of a channel, for the step kernel, in which one program holds it

# upstream's floor under |Re Lambda|; it keeps an initialisation on the imaginary axis strictly stable
MIN_DECAY = 1e-4


def real_form(z: torch.Tensor) -> torch.Tensor:
    """(..., N/2) complex -> (..., N) real, [real parts | imaginary parts]."""
    return torch.cat([z.real, z.imag], -1)


def complex_product(a: tuple, b: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    """(re, im) times (re, im)."""
    return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]


class Memo:
    """What a state space has derived from its parameters for single steps: `discrete` by `StateSpace.discretize`,
    `step` for the step kernel; None until it is needed. No dict: what moves arguments to a device would copy that.
    """

    __slots__ = ("discrete", "step")

    def __init__(self):
        self.discrete = self.step = None


class StateSpace(nn.Module):
    """hidden_size H; state_size N, the order of the real system, even; chunk_size T of the chunk mode.

    bidirectional: a second read-out C_reverse of the same system, run from the end of the sequence to its start;
    every output then sees the whole sequence, there is no step and no state, and no causal language model.
    """

    name: str  # as in S4Config.ssm
    # below this length the FFT convolution, with its kernel, takes less time than the chunk scan (forward and
    # backward, measured on a CPU); 0: never, a DPLR kernel costs more than the scan at every length
    fft_is_faster_below = 0
    kernels = "auto"  # as in S4Config.kernels: whether Triton kernels run
    has_dense_carry = False  # of the chunk scan; True where A-bar is no diagonal

    def __init__(
        self,
        hidden_size: int,
        state_size: int,
        init: str,
        discretization: str | None,
        dt_min: float,
        dt_max: float,
        chunk_size: int,
        bidirectional: bool,
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
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"0 < dt_min <= dt_max is needed, not dt_min={dt_min}, dt_max={dt_max}")
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be positive, not {chunk_size}")
        self.hidden_size, self.state_size = hidden_size, state_size
        self.init, self.discretization = init, discretization
        self.dt_min, self.dt_max = dt_min, dt_max
        self.chunk_size, self.bidirectional = chunk_size, bidirectional

    def _declare(self, **shapes: tuple[int, ...]) -> None:
        """Make the parameters, at least float32, and fill them unless they are on the meta device."""
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        if self.bidirectional:
            shapes["C_reverse"] = shapes["C"]
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.empty(shape, dtype=dtype)))
        if not self.log_dt.is_meta:
            for name, value in self.initial_values().items():
                getattr(self, name).data.copy_(value)

    def initial_values(self) -> dict[str, torch.Tensor]:
        """Fresh values for every parameter, by name."""
        raise NotImplementedError

    def _random_dt(self) -> torch.Tensor:
        """log dt, dt log-uniform between dt_min and dt_max."""
        return torch.empty(self.log_dt.shape).uniform_(math.log(self.dt_min), math.log(self.dt_max))

    def _apply(self, fn, recurse=True):
        """Let a move of the module change the device, or go to float64, but never below float32."""

        def keep_precision(tensor):
            moved = fn(tensor)
            if moved.is_floating_point() and moved.dtype in (torch.float16, torch.bfloat16):
                return tensor.to(moved.device)
            return moved

        return super()._apply(keep_precision, recurse)

    # ---- parameters -> system. Every method takes `reverse`, which selects the read-out of a bidirectional layer

    def _C(self, reverse: bool) -> torch.Tensor:
        return self.C_reverse if reverse else self.C

    def discretize(self, reverse: bool = False) -> tuple:
        """The discrete system, in the form that `_advance` takes."""
        raise NotImplementedError

    def _advance(self, discrete: tuple, u: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One token: u (B, H), state -> y (B, H) without D u, next state."""
        raise NotImplementedError

    def operators(self, length: int, reverse: bool = False) -> ChunkOperators:
        """The four operators of a chunk of `length` tokens, without D; see `ChunkOperators`."""
        raise NotImplementedError

    def kernel(self, length: int, reverse: bool = False) -> torch.Tensor:
        """K (H, L): y = causal convolution of u with K, plus D u."""
        raise NotImplementedError(f"{self.name} mixes the channels: it has no kernel a channel")

    def transition(self, length: int) -> torch.Tensor:
        """A_bar^length, as `carry_over` takes it: diagonal and complex as [real | imaginary], or dense (H, N, N)."""
        raise NotImplementedError

    def carry_over(self, transition: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """What is left of a state (B, *state_shape) after the tokens of `transition`, under a zero input."""
        return apply_diagonal(transition, state)

    # ---- from the layer's input to the signals that are scanned, and back. A single-input single-output layer scans
    # ---- its input itself; S5 overrides these five

    @property
    def state_shape(self) -> tuple[int, int]:
        """A state is (batch, *state_shape)."""
        return self.hidden_size, self.state_size

    def _drive(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def _read(self, signal: torch.Tensor, x: torch.Tensor, skipped: bool, reverse: bool) -> torch.Tensor:
        """The output (B, L, H) from the scanned signal; D x is added here unless it is in the signal (skipped) or the
        direction is the reverse one.
        """
        return signal if skipped or reverse else torch.addcmul(signal, x, self.D)

    def _with_skip(self, operators: ChunkOperators) -> ChunkOperators:
        """Operators with D in the first tap, which saves two passes over the sequence."""
        taps = operators.taps
        return operators._replace(taps=torch.cat([taps[:, :1] + self.D[:, None], taps[:, 1:]], 1))

    def _fft(self, signal: torch.Tensor, reverse: bool) -> torch.Tensor:
        """The scanned signal's answer from a zero state, by FFT."""
        raise NotImplementedError

    def _associative(self, signal: torch.Tensor, reverse: bool) -> torch.Tensor:
        """The same by an associative scan."""
        raise ValueError(f"mode associative is for s5, whose states are read out together, not for {self.name}")

    def _scan_state(self, state: torch.Tensor) -> torch.Tensor:
        """A state of the layer as one of the scan."""
        return state

    def _layer_state(self, state: torch.Tensor) -> torch.Tensor:
        """The inverse of `_scan_state`."""
        return state

    # ---- the three modes

    def zero_state(self, batch_size: int, device=None) -> torch.Tensor:
        """(B, H, N), in the dtype of the parameters; (B, 1, N) for S5."""
        return torch.zeros(batch_size, *self.state_shape, dtype=self.log_dt.dtype, device=device or self.log_dt.device)

    def forward(
        self,
        u: torch.Tensor,
        mode: str = "auto",
        initial_state: torch.Tensor | None = None,
        output_final_state: bool = True,
        memo: Memo | None = None,
        seq_idx: torch.Tensor | Documents | None = None,
        activation: nn.Module | None = None,
        in_place: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the layer over a sequence.

        u: (B, L, H), any floating dtype, any L; y comes back in the same dtype.
        mode: "chunk", "fft", "recurrent", for S5 also "associative"; "auto" takes the one that was measured to be the
        fastest.
        initial_state: (B, H, N), for S5 (B, 1, N), or None for zero. The final state is float32 (float64 for a float64
        layer), or None where output_final_state is False. Both are differentiable.
        memo: of the caller, keeps what single steps derive from the parameters, between calls while these stay the
        same. Every forward without autograd fills it: afterwards the parameters may be elsewhere (offloaded, sharded).
        seq_idx: (B, L) integers, the document of each token, or what `find_documents` made of them: the state is zero
        at the start of every run of equal numbers, except that the row's first run goes on from an initial state. A
        negative number is padding: its input counts as zero, and the state after it is zero.
        activation: applied to y; some of them a kernel applies on its way out, see FUSED_ACTIVATIONS.
        in_place: the caller does without its initial_state, and the step kernel may write the final one in its place,
        which is then the tensor returned.
        A bidirectional layer takes no initial state and returns None for the final one.
        Raises ValueError for another mode or shape.
        """
        if mode not in MODES:
            raise ValueError(f"mode is one of {', '.join(MODES)}, not {mode!r}")
        if u.dim() != 3 or u.shape[-1] != self.hidden_size:
            raise ValueError(f"u must be (batch, length, {self.hidden_size}), not {tuple(u.shape)}")
        B, L, _ = u.shape
        expected = (B, *self.state_shape)
        if initial_state is not None and tuple(initial_state.shape) != expected:
            raise ValueError(f"initial_state must be {expected}, not {tuple(initial_state.shape)}")
        if initial_state is not None and self.bidirectional:
            raise ValueError("a bidirectional state space reads from both ends: it takes no initial_state")
        if seq_idx is not None and not isinstance(seq_idx, Documents) and tuple(seq_idx.shape) != (B, L):
            raise ValueError(f"seq_idx must be {(B, L)}, not {tuple(seq_idx.shape)}")
        output_final_state = output_final_state and not self.bidirectional

        with torch.autocast(u.device.type, enabled=False):
            state = None if initial_state is None else initial_state.to(self.log_dt.dtype)
            if B == 0 or L == 0:
                y, state = u * self.D.to(u.dtype), self._state_or_zero(state, B, u.device)
                return _activated(y, activation), state if output_final_state else None
            in_kernel = (mode == "chunk" or (mode == "auto" and L > 1)) and self._in_kernel(u)
            if in_kernel:
                mode = "chunk"
            elif mode == "auto":
                mode = self._fastest_mode(L, needs_state=state is not None or output_final_state)
            if memo is not None and not self.bidirectional and not torch.is_grad_enabled():
                self.prepare_steps(memo, u)
            documents = seq_idx
            if torch.is_tensor(seq_idx):
                documents = find_documents(seq_idx, self.chunk_size)
            if mode == "recurrent" and self._steps_on_kernel(u, initial_state):
                y, state = self._run_steps(u, initial_state, documents, memo, activation, in_place)
                return y, state if output_final_state else None
            # the chunk scan's kernel reads bfloat16 as it is; operators and states stay float32 there too
            x = u if in_kernel and u.dtype == torch.bfloat16 else u.to(self.log_dt.dtype)
            if documents is not None:
                x = x.masked_fill((documents.seq_idx < 0)[..., None], 0)
            alone = documents is None and not self.bidirectional
            if in_kernel and alone and type(activation) in FUSED_ACTIVATIONS:
                y, state = self._scan(x, state, reverse=False, activation=FUSED_ACTIVATIONS[type(activation)])
                return y.to(u.dtype), state if output_final_state else None
            y, state = self._run(mode, x, state, documents, memo, output_final_state)
            if self.bidirectional:
                if documents is not None:
                    documents = find_documents(documents.seq_idx.flip(1), self.chunk_size)
                y = y + self._run(mode, x.flip(1), None, documents, None, False, reverse=True)[0].flip(1)
        return _activated(y.to(u.dtype), activation), state if output_final_state else None

    def _fastest_mode(self, length: int, needs_state: bool) -> str:
        if length == 1:
            return "recurrent"
        return "fft" if length < self.fft_is_faster_below and not needs_state else "chunk"

    def step(self, u: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One token: u (B, H), state -> y (B, H), next state. Raises ValueError for a bidirectional layer."""
        y, state = self(u[:, None], mode="recurrent", initial_state=state)
        return y[:, 0], state

    def advance(
        self, u: torch.Tensor, state: torch.Tensor, memo: Memo | None = None, begins: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The state after u (B, L, H), L at least 1, without the output.

        memo: as in `forward`; with one, token by token, as the recurrent mode does in PyTorch and, where it holds the
        discretised system, without a look at the parameters; without one, as a chunk scan.
        begins: (B, L) bool, tokens before which the state is set to zero; always token by token.
        """
        with torch.autocast(u.device.type, enabled=False):
            x, state = u.to(self.log_dt.dtype), state.to(self.log_dt.dtype)
            if memo is None and begins is None:
                return self._final_state(x, state)
            discrete = self.discrete_from(memo)
            for t, token in enumerate(x.unbind(1)):
                if begins is not None:
                    state = torch.where(begins[:, t, None, None], 0, state)
                _, state = self._advance(discrete, token, state)
            return state

    def _final_state(self, x, state):
        final = self._scan(self._drive(x), self._scan_state(state), reverse=False, has_output=False)[1]
        return self._layer_state(final)

    def discrete_from(self, memo: Memo | None, reverse: bool = False) -> tuple:
        """The discretised system, from `memo` or kept there."""
        if memo is not None and memo.discrete is not None:
            return memo.discrete
        discrete = self.discretize(reverse)
        if memo is not None and not torch.compiler.is_compiling():
            memo.discrete = discrete  # what a compiled graph puts out is not for keeping, and would recompile it
        return discrete

    def _state_or_zero(self, state, batch_size, device):
        return self.zero_state(batch_size, device) if state is None else state

    def _run(self, mode, x, state, documents, memo, output_final_state, reverse=False):
        """x (B, L, H), neither of them 0, in the dtype of the parameters -> y with D x (forward only), final state."""
        if mode == "recurrent":
            y, state = self._run_recurrent(x, state, documents, memo, reverse)
            return (y if reverse else torch.addcmul(y, x, self.D)), state
        if mode == "chunk":
            return self._run_chunk(x, state, documents, reverse)
        whole = self._associative if mode == "associative" else self._fft
        return self._run_whole(whole, x, state, documents, output_final_state, reverse)

    def _steps_on_kernel(self, u, state) -> bool:
        """Whether the step kernel does the recurrent mode: where no gradient is needed, and no second direction."""
        if self.bidirectional or torch.is_grad_enabled():
            return False
        unsupported = None
        if self.log_dt.dtype != torch.float32 or u.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            unsupported = f"inputs of {u.dtype}, parameters of {self.log_dt.dtype}"
        elif not self._state_fits_step_kernel():
            unsupported = f"state_size {self.state_size}"
        tensors = (u, self.log_dt) if state is None else (u, self.log_dt, state)
        return use_kernel("step", *tensors, unsupported=unsupported, setting=self.kernels)

    def _state_fits_step_kernel(self) -> bool:
        return True

    def _run_steps(self, u, state, documents, memo, activation, in_place):
        """The recurrent mode by the step kernel: the state stays at its address; y has D u and activation."""
        system = self._step_system_from(Memo() if memo is None else memo)
        if state is None:
            state = self.zero_state(u.shape[0], u.device)
        elif not (in_place and state.dtype == torch.float32 and state.is_contiguous()):
            state = state.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        if documents is not None:
            u = u.masked_fill((documents.seq_idx < 0)[..., None], 0)
        fused = FUSED_ACTIVATIONS.get(type(activation))
        outputs = []
        for t, token in enumerate(u.unbind(1)):
            if documents is not None:
                state.masked_fill_(documents.begins[:, t, None, None], 0)
            outputs.append(self._step_kernel(token, state, system, fused or "identity"))
        y = outputs[0][:, None] if len(outputs) == 1 else torch.stack(outputs, 1)
        return y if fused else activation(y), state

    def prepare_steps(self, memo: Memo, u: torch.Tensor) -> None:
        """Keep in `memo` what single steps on inputs like u (B, L, H) derive from the parameters."""
        self.discrete_from(memo)
        if self._steps_on_kernel(u, None):
            self._step_system_from(memo)

    def _step_system_from(self, memo: Memo) -> tuple[torch.Tensor, ...]:
        if memo.step is not None:
            return memo.step
        system = self._step_system(self.discrete_from(memo))
        if not torch.compiler.is_compiling():
            memo.step = system
        return system

    def _step_system(self, discrete: tuple) -> tuple[torch.Tensor, ...]:
        """What `discretize` returns as the tensors of `_step_kernel`."""
        raise NotImplementedError

    def _step_kernel(self, u, state, system, activation: str) -> torch.Tensor:
        """u (B, H) -> y; the state advances in place."""
        raise NotImplementedError

    def _run_recurrent(self, x, state, documents, memo, reverse):
        discrete = self.discrete_from(memo, reverse)
        state = self._state_or_zero(state, x.shape[0], x.device)
        outputs = []
        for t, u in enumerate(x.unbind(1)):
            if documents is not None:
                state = torch.where(documents.begins[:, t, None, None], 0, state)
            y, state = self._advance(discrete, u, state)
            outputs.append(y)
        return torch.stack(outputs, 1), state

    def _run_chunk(self, x, state, documents, reverse):
        signal, start = self._drive(x), None if state is None else self._scan_state(state)
        if documents is None:
            signal, final = self._scan(signal, start, reverse)
        else:
            B, T, chunks = len(x), documents.chunk_size, documents.chunks
            apart = move_apart(signal, documents.slot, B, chunks * T)
            signal, final = self._scan_chunks(apart, T, None, reverse, documents.keep)
            signal = move_together(signal, documents.slot, B)
            signal, final = self._continue(signal, final, start, documents, reverse)
        return self._read(signal, x, skipped=True, reverse=reverse), self._layer_state(final)

    def _run_whole(self, whole, x, state, documents, output_final_state, reverse):
        """whole: what answers a signal (B, L, C) from a zero state at once, `_fft` or `_associative`."""
        drive, start = self._drive(x), None if state is None else self._scan_state(state)
        final = None
        if documents is None:
            signal = whole(drive, reverse)
            if start is not None:
                # by linearity the initial state adds what it would emit under a zero input
                signal = signal + self._scan(torch.zeros_like(drive), start, reverse, skip=False)[0]
            if output_final_state:
                final = self._scan(drive, start, reverse, has_output=False)[1]
        else:
            B, T, chunks = len(x), documents.chunk_size, documents.chunks
            signal = whole(move_apart(drive, documents.row_slot, documents.rows, documents.longest), reverse)
            signal = move_together(signal, documents.row_slot, B)
            if output_final_state:
                apart = move_apart(drive, documents.slot, B, chunks * T)
                final = self._scan_chunks(apart, T, None, reverse, documents.keep, has_output=False)[1]
            signal, final = self._continue(signal, final, start, documents, reverse)
        return self._read(signal, x, skipped=False, reverse=reverse), None if final is None else self._layer_state(
            final
        )

    def _continue(self, signal, final, start, documents, reverse):
        """Add what an initial state does to the first document of every row, which goes on from it."""
        if start is None:
            return signal, final
        emitted, left = self._scan(torch.zeros_like(signal), start, reverse, skip=False)
        signal = signal + torch.where(documents.continues[..., None], emitted, 0)
        if final is not None:
            final = final + torch.where(documents.continues[:, -1, None, None], left, 0)
        return signal, final

    def _in_kernel(self, u: torch.Tensor) -> bool:
        """Whether the Triton kernel scans u (B, L, H), as bfloat16 or in the dtype of the parameters."""
        dtype = self.log_dt.dtype
        if u.dtype == torch.bfloat16 and dtype == torch.float32:
            dtype = u.dtype
        problem = dtype, self.state_size, self.has_dense_carry
        unsupported = unsupported_by_kernel(u, *problem)
        return use_kernel("chunk_scan", u, unsupported=unsupported, setting=self.kernels, problem=problem)

    def has_rows(self, y: torch.Tensor) -> bool:
        """Whether the output y (B, L, H) is a view of the kernel's rows; see `gradient_in_rows`."""
        return not y.is_contiguous() and y.permute(2, 0, 1).is_contiguous() and self._in_kernel(y)

    def _scan(self, signal, state, reverse, has_output=True, skip=True, activation="identity"):
        """The chunk scan over any length: whole chunks, then what is left as one chunk of its own length. The kernel
        takes any length at once, unless it goes on from a state, and applies an activation.
        """
        L = signal.shape[1]
        T = min(self.chunk_size, L)
        whole = L // T * T
        if self._in_kernel(signal):
            T = min(T, longest_chunk(signal.dtype, self.state_size, self.has_dense_carry))
            whole = L if state is None else L // T * T
        y, state = self._scan_chunks(signal[:, :whole], T, state, reverse, None, has_output, skip, activation)
        if whole < L:
            rest = signal[:, whole:]
            rest, state = self._scan_chunks(rest, L - whole, state, reverse, None, has_output, skip, activation)
            y = torch.cat([y, rest], 1) if has_output else None
        return y, state

    def _scan_chunks(self, signal, T, state, reverse, keep=None, has_output=True, skip=True, activation="identity"):
        kernels = self.kernels if self._in_kernel(signal) else None
        longest = T if kernels is None else longest_chunk(signal.dtype, self.state_size, self.has_dense_carry)
        if T > longest:
            # chunks of documents, for a kernel of shorter ones: a state is reset at the first part of a chunk alone
            shorter = next(t for t in range(longest, 0, -1) if T % t == 0)
            if keep is not None:
                keep = F.pad(keep[..., None], (0, T // shorter - 1), value=True).flatten(1)
            T = shorter
        maker = _OperatorMaker(self, T, reverse, skip and not reverse)
        if torch.compiler.is_compiling():
            operators = maker()
            return chunk_scan(
                signal, operators, state, keep, has_output=has_output, kernels=kernels, activation=activation
            )
        names, parameters = zip(*maker.named_parameters(), strict=True)

        def make(*values):
            return functional_call(maker, dict(zip(names, values, strict=True)), ())

        return chunk_scan(signal, make, state, keep, parameters, has_output, kernels, activation)

    def extra_repr(self) -> str:
        return (
            f"hidden_size={self.hidden_size}, state_size={self.state_size}, init={self.init}, "
            f"discretization={self.discretization}, chunk_size={self.chunk_size}, bidirectional={self.bidirectional}"
        )


def _activated(y: torch.Tensor, activation: nn.Module | None) -> torch.Tensor:
    return y if activation is None else activation(y)


class _OperatorMaker(nn.Module):
    """The operators of a layer as a function of its parameters, for `chunk_scan`, which calls it once more in the
    backward, with the parameters that the forward saw.
    """

    def __init__(self, layer: StateSpace, length: int, reverse: bool, skip: bool):
        super().__init__()
        self.layer, self.length, self.reverse, self.skip = layer, length, reverse, skip

    def forward(self) -> ChunkOperators:
        operators = self.layer.operators(self.length, self.reverse)
        return self.layer._with_skip(operators) if self.skip else operators


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
        if n_ssm < 1 or hidden_size % n_ssm:
            raise ValueError(f"n_ssm must divide hidden_size ({hidden_size}), and {n_ssm} does not")
        if b_clip is not None and not b_clip > 0:
            raise ValueError(f"b_clip must be positive, not {b_clip}")
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
        """(..., n_ssm, k) -> (..., H, k): channel h takes copy h mod n_ssm."""
        if self.n_ssm == self.hidden_size:
            return shared
        if self.n_ssm == 1:
            return shared.expand(*shared.shape[:-2], self.hidden_size, -1)
        return shared.repeat(*[1] * (shared.dim() - 2), self.hidden_size // self.n_ssm, 1)

    def _state_fits_step_kernel(self):
        return self.state_size <= MAX_STEP_STATE

    def _step_kernel(self, u, state, system, activation):
        from .triton_step import siso_step_

        return siso_step_(u, state, *system, self.D, activation)

    def _fft(self, signal, reverse):
        return fft_convolution(signal, self.kernel(signal.shape[1], reverse))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, n_ssm={self.n_ssm}, b_clip={self.b_clip}"
