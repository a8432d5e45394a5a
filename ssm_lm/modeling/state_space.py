"""StateSpace: what S4, S4D and S5 share: parameters, dtype policy, and the three ways to run.

A layer is a linear time-invariant system with a real state. Complex states come in conjugate pairs; one of each pair
is kept, as real numbers [real parts | imaginary parts], which makes the state a real vector of length N.

Three ways to run it agree to rounding:
    chunk      matmuls within chunks of T tokens and a recurrence over the chunks: O(L)      sequence_modes.py
    fft        the kernel of the whole length, then an FFT convolution: O(L log L), the papers' training mode
    recurrent  one token after the other: O(1) memory a token, for generation                single_steps.py

Which of them, and whether in a Triton kernel, is decided once a forward: execution.py.

Parameters are real tensors: complex ones break optimizers, collectives and safetensors. They stay float32 (or
float64) whatever dtype the model is moved to or autocast to, and so do operators and states: dt and Lambda need the
exponent and the digits. The signal is the tokens' and goes with them: in an autocast region it is what a matrix product
would take, see `execution.as_autocast`.
"""

import math

import torch
from torch import nn

from .checks import DISCRETIZATIONS, check_system
from .chunked import ChunkOperators, with_skip
from .discrete import Discrete
from .documents import Documents, find_documents
from .execution import MODES, Execution, Problem, as_autocast, as_autocast_dtype, decide, rule_of
from .kernel_launch import architecture, family
from .kernel_limits import chunks_in_a_row, limit_of_chunk_scan, limit_of_step, longest_chunk
from .native_operators import takes
from .real_form import apply_diagonal
from .sequence_modes import LayerScan, run_chunk, run_whole
from .single_steps import Memo, prepare_steps, run_steps, run_steps_on_kernel, state_after

# upstream's floor under |Re Lambda|; it keeps an initialisation on the imaginary axis strictly stable
MIN_DECAY = 1e-4


class StateSpace(nn.Module):
    """hidden_size H; state_size N, the order of the real system, even; chunk_size T of the chunk mode.

    bidirectional: a second read-out C_reverse of the same system, run from the end of the sequence to its start;
    every output then sees the whole sequence. Such a layer cannot run step by step, and serves classification only.
    """

    name: str  # as in S4Config.ssm
    # below this length the FFT convolution, with its kernel, takes less time than the chunk scan (forward and
    # backward, measured on a CPU); 0: never, a DPLR kernel costs more than the scan at every length
    fft_is_faster_below = 0
    kernels = "auto"  # as in S4Config.kernels: whether Triton kernels run
    has_chunk_kernel = True  # whether the chunk scan has a Triton kernel for the layer's signals
    scan_library = "operators"  # of native_library.py, which has the chunk scan on a CPU; None: none has
    step_operation = "step"  # the kernel of a single token
    is_time_invariant = True  # False where B, C or dt depend on the token
    unconvolved = 0  # features at the end of its input that a convolution before it leaves as they are
    has_dense_carry = False  # of the chunk scan; True where A-bar is not diagonal
    # of a layer of one's own, what ssm_init and discretization may be, the default first; see register_layer
    initializations = ("legs",)
    discretizations = ("zoh",)

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
        check_system(
            self.name,
            init=init,
            discretization=discretization,
            state_size=state_size,
            dt_min=dt_min,
            dt_max=dt_max,
            chunk_size=chunk_size,
            init_key=f"init of {self.name}",
            discretization_key=f"discretization of {self.name}",
        )
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

    def discretize(self, reverse: bool = False) -> Discrete:
        """The discrete system; see discrete.py."""
        raise NotImplementedError

    def operators(self, length: int, reverse: bool = False) -> ChunkOperators:
        """The four operators of a chunk of `length` tokens, without D; see `ChunkOperators`."""
        raise NotImplementedError

    def operators_with_skip(self, length: int) -> ChunkOperators:
        """Those of the forward direction with D in the first tap, which saves two passes over the sequence."""
        return self.with_skip(self.operators(length))

    def kernel(self, length: int, reverse: bool = False) -> torch.Tensor:
        """K (H, L): y = causal convolution of u with K, plus D u."""
        raise NotImplementedError(f"{self.name} mixes the channels: it has no kernel a channel")

    def transition(self, length: int) -> torch.Tensor:
        """A_bar^length, as `carry_over` takes it: diagonal and complex as [real | imaginary], or dense (H, N, N)."""
        raise NotImplementedError

    def transition_over(self, u: torch.Tensor) -> torch.Tensor:
        """The transition over the tokens u (B, L, input_size); of (B, ...) where it depends on them."""
        return self.transition(u.shape[1])

    def time_constants(self) -> torch.Tensor | None:
        """-1 / (dt Re Lambda) of every state: after so many tokens a state under a zero input has 1/e of its size left.

        (H, N/2), for S5 (P/2,), for SSD (heads,), where a step that the token chooses counts as if it were neutral; of
        S4 by its Lambda alone, without the low rank. None of a layer without a parameter Lambda_log_re.
        """
        log_rate = getattr(self, "Lambda_log_re", None)
        return None if log_rate is None else (-self.log_dt - log_rate).exp()

    def carry_over(self, transition: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """What is left of a state (B, *state_shape) after the tokens of `transition`, under a zero input."""
        return apply_diagonal(transition, state)

    # ---- from the layer's input to the signals that are scanned, and back. A single-input single-output layer scans
    # ---- its input itself; S5 and SSD override these

    @property
    def input_size(self) -> int:
        """Features of the input u: the channels, and what else a layer reads of a token."""
        return self.hidden_size

    def skipped(self, x: torch.Tensor) -> torch.Tensor:
        """What D multiplies, (B, L, H) of the input."""
        return x

    @property
    def state_shape(self) -> tuple[int, int]:
        """A state is (batch, *state_shape)."""
        return self.hidden_size, self.state_size

    def drive(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, H) -> what is scanned, (B, L, C)."""
        return x

    def read(self, signal: torch.Tensor, x: torch.Tensor, skipped: bool, reverse: bool) -> torch.Tensor:
        """The output (B, L, H) from the scanned signal; D x is added here unless it is in the signal (skipped) or the
        direction is the reverse one.
        """
        return signal if skipped or reverse else torch.addcmul(signal, x, self.D)

    def with_skip(self, operators: ChunkOperators) -> ChunkOperators:
        """Operators with D in the first tap."""
        return operators._replace(taps=with_skip(operators.taps, self.D))

    def convolve(self, signal: torch.Tensor, reverse: bool) -> torch.Tensor:
        """The scanned signal's answer from a zero state, by FFT."""
        raise NotImplementedError

    def associative_scan(self, signal: torch.Tensor, reverse: bool) -> torch.Tensor:
        """The same by an associative scan."""
        raise ValueError(f"mode associative is for s5, whose states are read out together, not for {self.name}")

    def to_scan_state(self, state: torch.Tensor) -> torch.Tensor:
        """A state of the layer as one of the scan."""
        return state

    def from_scan_state(self, state: torch.Tensor) -> torch.Tensor:
        """The inverse of `to_scan_state`."""
        return state

    # ---- what its kernels can do; see execution.py

    def scan_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """How the chunk scan takes an input of this dtype: bfloat16 as it is, all else as the parameters are."""
        parameters = self.log_dt.dtype
        return dtype if dtype == torch.bfloat16 and parameters == torch.float32 else parameters

    def kernel_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """How the scan's kernel takes it."""
        return self.scan_dtype(dtype)

    def longest_chunk(self, architecture: str, dtype: torch.dtype) -> int:
        """The longest chunk that the scan's kernel takes of signals in this dtype."""
        return longest_chunk(dtype, self.state_size, self.has_dense_carry)

    def chunk_on_kernel(self, architecture: str, dtype: torch.dtype) -> int:
        """How long its chunks are there."""
        return min(self.chunk_size, self.longest_chunk(architecture, dtype))

    def scans_in_c(self, dtype: torch.dtype) -> bool:
        """Whether the chunk scan of signals in this dtype is that of `scan_library`."""
        if self.scan_library is None or dtype != self.log_dt.dtype:
            return False
        return takes((self.log_dt,), self.hidden_size, self.state_size, self.kernels, self.scan_library)

    def scans_this_in_c(self, signal: torch.Tensor) -> bool:
        """The same of a signal, which may be on another device, or a subclass without numbers."""
        return type(signal) is torch.Tensor and signal.device.type == "cpu" and self.scans_in_c(signal.dtype)

    def scan_kernel(self, architecture: str, dtype: torch.dtype) -> tuple[str, str | None, tuple]:
        """The operation that scans signals in this dtype, what its kernel cannot do of them, and the problem's key."""
        key = dtype, self.state_size, self.has_dense_carry
        return "chunk_scan", limit_of_chunk_scan(architecture, *key), key

    @property
    def step_state_size(self) -> int:
        """States that one program of the step's kernel holds."""
        return self.state_size

    def limit_of_step(self, dtype: torch.dtype) -> str | None:
        """What the step's kernel cannot do of inputs in this dtype, in words, or None."""
        return limit_of_step(dtype, self.log_dt.dtype, self.step_state_size)

    def step_on_kernel(self, u: torch.Tensor, state: torch.Tensor, coefficients: tuple, activation: str):
        """One token by the step's kernel: u (B, H) -> y with D u and the activation; the state advances in place."""
        raise NotImplementedError

    # ---- to run it

    def zero_state(self, batch_size: int, device=None) -> torch.Tensor:
        """(B, H, N), in the dtype of the parameters; (B, 1, N) for S5."""
        return torch.zeros(batch_size, *self.state_shape, dtype=self.log_dt.dtype, device=device or self.log_dt.device)

    def decide(
        self, u: torch.Tensor, mode: str = "auto", initial_state: torch.Tensor | None = None, **facts
    ) -> Execution:
        """The execution of a forward over u (B, L, H). facts: further ones of `execution.Problem`."""
        problem = Problem(
            mode,
            u.shape[1],
            as_autocast_dtype(u),
            architecture(u.device),
            from_state=initial_state is not None,
            gradient=torch.is_grad_enabled(),
            **facts,
        )
        return decide(self, problem, rule_of(self, u, initial_state))

    def fills_rows(self, u: torch.Tensor, mode: str = "auto", activation: nn.Module | None = None) -> bool:
        """Whether a forward over u (B, L, H) from a zero state reads rows (H, B, L) in a kernel, as long as they are:
        what comes as a view of such rows is then not copied.
        """
        B, L, _ = u.shape
        if B == 0 or L == 0:
            return False
        execution = self.decide(u, mode, activation=activation)
        T, kind = execution.chunk_size, family(architecture(u.device))
        chunks = chunks_in_a_row(kind, B, L, T, self.state_size, self.has_dense_carry, from_zero=True)
        return execution.in_rows and L == T * chunks

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
        execution: Execution | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the layer over a sequence.

        u: (B, L, input_size), which is H but for ssd; any floating dtype, any L. y (B, L, H) comes back in its dtype;
        in an autocast region of bfloat16, a float32 u is rounded to that, and y comes back in it.
        mode: "chunk", "fft", "recurrent", for S5 also "associative"; "auto" takes the one that was measured to be the
        fastest.
        initial_state: (B, H, N), for S5 (B, 1, N), or None for zero. The final state is float32 (float64 for a float64
        layer), or None where output_final_state is False. Both are differentiable.
        memo: of the caller, keeps what single steps derive from the parameters, between calls, until these are
        written to. Every forward without autograd fills it: afterwards the parameters may be elsewhere (offloaded,
        sharded).
        seq_idx: (B, L) integers, the document of each token, or what `find_documents` made of them: the state is zero
        at the start of every run of equal numbers, except that the row's first run goes on from an initial state. A
        negative number is padding: its input counts as zero, and the state after it is zero.
        activation: applied to y; some of them a kernel applies on its way out, see FUSED_ACTIVATIONS.
        in_place: the caller does without its initial_state, and the step kernel may write the final one in its place,
        which is then the tensor returned.
        execution: what `decide` has said of this forward, where the caller has asked; it stands for `mode`.
        A bidirectional layer refuses an initial state and returns None for the final one.
        Raises ValueError for another mode or shape.
        """
        self._check(u, mode, initial_state, seq_idx)
        u = as_autocast(u)
        B, L, _ = u.shape
        output_final_state = output_final_state and not self.bidirectional
        with torch.autocast(u.device.type, enabled=False):
            state = None if initial_state is None else initial_state.to(self.log_dt.dtype)
            if B == 0 or L == 0:
                y = self.skipped(u) * self.D.to(u.dtype)
                state = self.zero_state(B, u.device) if state is None else state
                return _activated(y, activation), state if output_final_state else None
            execution = execution or self.decide(
                u,
                mode,
                initial_state,
                needs_state=output_final_state,
                documents=seq_idx is not None,
                activation=activation,
            )
            if memo is not None and not self.bidirectional and not torch.is_grad_enabled():
                prepare_steps(self, memo, u, execution)
            documents = find_documents(seq_idx, self.chunk_size) if torch.is_tensor(seq_idx) else seq_idx
            if execution.mode == "recurrent" and execution.kernel:
                fused = execution.activation or "identity"
                y, state = run_steps_on_kernel(self, u, initial_state, documents, memo, fused, in_place)
            else:
                x = u.to(execution.dtype)
                if documents is not None:
                    x = x.masked_fill((documents.seq_idx < 0)[..., None], 0)
                y, state = self._run(x, state, documents, memo, execution, output_final_state)
                if self.bidirectional:
                    y = y + self._run_reverse(x, documents, execution)
                y = y.to(u.dtype)
        if execution.activation is None:
            y = _activated(y, activation)
        return y, state if output_final_state else None

    def _check(self, u, mode, initial_state, seq_idx):
        if mode not in MODES:
            raise ValueError(f"mode is one of {', '.join(MODES)}, not {mode!r}")
        if u.dim() != 3 or u.shape[-1] != self.input_size:
            raise ValueError(f"u must be (batch, length, {self.input_size}), not {tuple(u.shape)}")
        B, L, _ = u.shape
        expected = (B, *self.state_shape)
        if initial_state is not None and tuple(initial_state.shape) != expected:
            raise ValueError(f"initial_state must be {expected}, not {tuple(initial_state.shape)}")
        if initial_state is not None and self.bidirectional:
            raise ValueError("a bidirectional state space reads from both ends: it takes no initial_state")
        if seq_idx is not None and not isinstance(seq_idx, Documents) and tuple(seq_idx.shape) != (B, L):
            raise ValueError(f"seq_idx must be {(B, L)}, not {tuple(seq_idx.shape)}")

    def _run(self, x, state, documents, memo, execution, needs_state, reverse=False):
        """x (B, L, H), neither of them 0, in the dtype of the execution -> y with D x (forward only), final state."""
        if execution.mode == "recurrent":
            y, state = run_steps(self, x, state, documents, memo, reverse)
            return (y if reverse else torch.addcmul(y, self.skipped(x), self.D)), state
        if execution.mode == "chunk":
            return self.run_chunk(x, state, documents, execution, reverse)
        return run_whole(self, x, state, documents, execution, needs_state, reverse)

    def _run_reverse(self, x, documents, execution):
        if documents is not None:
            documents = find_documents(documents.seq_idx.flip(1), self.chunk_size)
        return self._run(x.flip(1), None, documents, None, execution, False, reverse=True)[0].flip(1)

    def run_chunk(self, x, state, documents, execution, reverse=False):
        """The mode chunk; see `sequence_modes.run_chunk`."""
        return run_chunk(self, x, state, documents, execution, reverse)

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
        u = as_autocast(u)
        with torch.autocast(u.device.type, enabled=False):
            state = state.to(self.log_dt.dtype)
            if memo is None and begins is None:
                execution = self.decide(u, "chunk", state)
                return self.scan_to_end(u.to(execution.dtype), state, execution)
            return state_after(self, u.to(self.log_dt.dtype), state, memo, begins)

    def scan_to_end(self, x, state, execution: Execution) -> torch.Tensor:
        """The state after x (B, L, H) from `state`, by the scan without its output."""
        return self.from_scan_state(LayerScan(self, execution).final_state(self.drive(x), self.to_scan_state(state)))

    def extra_repr(self) -> str:
        return (
            f"hidden_size={self.hidden_size}, state_size={self.state_size}, init={self.init}, "
            f"discretization={self.discretization}, chunk_size={self.chunk_size}, bidirectional={self.bidirectional}"
        )


def _activated(y: torch.Tensor, activation: nn.Module | None) -> torch.Tensor:
    return y if activation is None else activation(y)
