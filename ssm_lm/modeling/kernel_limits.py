"""What each Triton kernel can do: every function returns what of a problem its kernel cannot do, in words, or None.

They ask for dtypes, sizes and an architecture alone, no tensor: `ssm-lm estimate` answers for a GPU that is not there.
"""

import re

import torch

from .kernel_launch import family

OLDEST_CAPABILITY = (8, 0)  # bfloat16 on tensor cores


def limit_of_architecture(architecture: str) -> str | None:
    """Of an NVIDIA GPU; AMD's are all supported that Triton knows."""
    match = re.fullmatch(r"sm_(\d+)(\d)", architecture)
    if match is None or (int(match[1]), int(match[2])) >= OLDEST_CAPABILITY:
        return None
    found, needed = f"{match[1]}.{match[2]}", ".".join(map(str, OLDEST_CAPABILITY))
    return f"its compute capability is {found}, and the kernels need {needed}"


# ---- the chunk scan: beyond these a program's operators leave its registers

SCAN_DTYPES = (torch.bfloat16, torch.float32)
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of kernels that read, reckon in float32 and write
LARGEST_STATE = 128


def longest_chunk(dtype: torch.dtype, N: int, dense: bool) -> int:
    """How many tokens a chunk of the chunk scan's kernel may have; dtype: one of SCAN_DTYPES."""
    if dtype == torch.bfloat16:
        return 64
    return 16 if dense and N > 64 else 32


def largest_state(architecture: str, dense: bool) -> int:
    """How many states a channel may have: of a dense carry, more than 64 take the shared memory (above 100 KiB) that
    NVIDIA's data centre cards have, and no others.
    """
    small = family(architecture) in ("cuda", "blackwell") and architecture not in ("sm_80", "sm_90", "sm_100", "sm_103")
    return 64 if dense and small else LARGEST_STATE


def limit_of_chunk_scan(architecture: str, dtype: torch.dtype, N: int, dense: bool) -> str | None:
    """A scan of real signals in `dtype` with N states a channel, a dense carry or a diagonal one."""
    if dtype not in SCAN_DTYPES:
        return f"its numbers are {dtype}, not bfloat16 or float32"
    largest = largest_state(architecture, dense)
    return f"its state has {N} numbers a channel, more than {largest}" if N > largest else None


ROWS = 16  # of the matrix products of the scan: batch elements, and segments where these are fewer
SHORTEST_SEGMENT = 4  # chunks; a segment costs a pass over its tokens and a step of the link


def segments(family: str, B: int, C: int, N: int, dense: bool) -> int:
    """Into how many segments each of B rows of C chunks is cut, a divisor of C; 1: none. Powers of a dense carry of
    more than 64 states do not fit where those of smaller ones are made; on Blackwell a square of 64 x 64 is tcgen05's,
    or spills. family: see `kernel_launch.family`.
    """
    if dense and (N > 64 or family == "blackwell"):
        return 1
    G = 1
    while B * G * 2 <= ROWS and C % (G * 2) == 0 and C // (G * 2) >= SHORTEST_SEGMENT:
        G *= 2
    return G


def chunks_in_a_row(family: str, B: int, L: int, T: int, N: int, dense: bool, from_zero: bool) -> int:
    """How many chunks a row of L tokens is laid out in. From a zero state zeros may stand before the first token: as
    many as make whole chunks, and chunks as make more segments, but not an eighth more of them. From another one, L is
    a multiple of T.
    """
    chunks = -(-L // T)
    if not from_zero:
        return chunks
    best = chunks
    for more in range(chunks + 1, chunks + chunks // 8 + 1):
        if segments(family, B, more, N, dense) > segments(family, B, best, N, dense):
            best = more
    return best


# ---- the others


def limit_of_s5_scan(dtype: torch.dtype) -> str | None:
    return None if dtype in (torch.float32, torch.bfloat16) else f"signals of {dtype}"


SHORTEST_S5_CHUNK, MOST_S5_CHUNKS = 64, 1024


def s5_chunk_length(L: int) -> int:
    """Tokens a chunk: few enough to fill the GPU and to keep rounding Lambda harmless; no more chunks than
    MOST_S5_CHUNKS, which follow one another in `carry_kernel`.
    """
    return max(SHORTEST_S5_CHUNK, 1 << (-(-L // MOST_S5_CHUNKS) - 1).bit_length())


LARGEST_SSD_STATE = 128


def longest_ssd_chunk(architecture: str, dtype: torch.dtype, N: int) -> int:
    """How many tokens a chunk of the kernels of ssd's scan may have: beyond, tiles leave the registers, but on Hopper,
    whose products read shared memory. What lies in memory between the launches is a state a chunk.
    """
    return 64 if architecture == "sm_90" and dtype == torch.bfloat16 and N <= 64 else 32


def limit_of_ssd_scan(architecture: str, dtype: torch.dtype, N: int) -> str | None:
    """A scan of N states a channel, of tokens in `dtype`, parameters in float32; of longer chunks it makes several."""
    if family(architecture) == "hip":
        return "its backward does not fit the registers of AMD's cards"
    if dtype not in SCAN_DTYPES:
        return f"its numbers are {dtype}, not bfloat16 or float32"
    return f"its state has {N} numbers a channel, more than {LARGEST_SSD_STATE}" if N > LARGEST_SSD_STATE else None


MOST_TAPS = 4  # of the short convolution; the inputs that they see stay in registers
CONVOLVED_ROWS, CONVOLVED_CHANNELS = 8, 128  # of a program, which walks the tokens of as many segments at once


def limit_of_short_convolution(u: torch.dtype, parameters: torch.dtype, K: int, activation: str) -> str | None:
    """Of inputs of dtype `u`, K taps of dtype `parameters`, and what follows."""
    if not {u, parameters} <= set(KERNEL_DTYPES):
        return f"inputs of {u}, parameters of {parameters}"
    if activation not in ("identity", "silu"):
        return f"the activation {activation}"
    return f"{K} taps, more than {MOST_TAPS}" if K > MOST_TAPS else None


def convolved_tokens(B: int, L: int, C: int) -> tuple[int, int]:
    """(tokens of a segment, programs a row of the batch). A segment reads K - 1 tokens beside its own, so that they are
    long where they still fill the GPU, and a program's sums of the backward few.
    """
    rows = B * L * -(-C // CONVOLVED_CHANNELS)  # of CONVOLVED_CHANNELS numbers
    fair = max(1, rows // (2048 * CONVOLVED_ROWS))
    T = max(1, min(L, 128, max(8, 1 << (fair.bit_length() - 1))))
    return T, max(1, -(-L // (T * CONVOLVED_ROWS)))


MOST_NORMED = 4096  # channels, of which a program holds whole rows: beyond, those of the backward leave the registers
NORM_PROGRAMS = 1024  # of the backward


def limit_of_rms_norm(x: torch.dtype, weight: torch.dtype, C: int) -> str | None:
    if not {x, weight} <= set(KERNEL_DTYPES):
        return f"inputs of {x}, parameters of {weight}"
    return f"{C} channels, more than {MOST_NORMED}" if C > MOST_NORMED else None


def limit_of_dropout(*dtypes: torch.dtype, C: int = 0) -> str | None:
    """Of rows of C channels where their place matters."""
    if not set(dtypes) <= set(KERNEL_DTYPES):
        return f"numbers of {', '.join(map(str, dtypes))}"
    return f"{C} channels, more than {MOST_NORMED}" if C > MOST_NORMED else None


TURNED_ROWS = 16  # of a norm that turns them: in bfloat16, 32 bytes of a channel, what memory moves at least
MOST_TURNED = 1024  # channels: so many rows of more leave the registers


def turns_rows(rows: int, C: int) -> bool:
    """Whether a layer norm of so many rows may be turned."""
    return rows % TURNED_ROWS == 0 and C <= MOST_TURNED


def rows_of_a_norm(C: int, turned: bool = False) -> int:
    """Rows of C channels that a program holds at a time."""
    return TURNED_ROWS if turned else max(1, 2048 >> (C - 1).bit_length())


def programs_of_a_norm(rows: int, C: int, turned: bool = False) -> int:
    """Of the backward, each of which takes every so manieth block of rows."""
    return min(-(-rows // rows_of_a_norm(C, turned)), NORM_PROGRAMS)


def limit_of_cross_entropy(z: torch.dtype) -> str | None:
    return None if z in KERNEL_DTYPES else f"logits of {z}"


LARGEST_STEP_STATE = 1024  # of a channel, which one program of the step's kernel holds


def limit_of_step(u: torch.dtype, parameters: torch.dtype, N: int) -> str | None:
    """A step on inputs of dtype `u`, N states a channel; S5's states, which many programs share, count as none."""
    if parameters != torch.float32 or u not in KERNEL_DTYPES:
        return f"inputs of {u}, parameters of {parameters}"
    return f"state_size {N}" if N > LARGEST_STEP_STATE else None


LARGEST_OPERATOR_STATE = 64  # of a channel, whose N x N matrices stay in the registers of a program


def limit_of_dplr_operators(dtype: torch.dtype, rank: int) -> str | None:
    """S4's discretisation; and the operators of a chunk, of any length, with at most LARGEST_OPERATOR_STATE states."""
    if dtype == torch.float32 and rank in (1, 2):
        return None
    return f"{dtype}, rank {rank}; it has float32 and rank 1 and 2"


def limit_of_diagonal_operators(dtype: torch.dtype) -> str | None:
    """The operators of a chunk of S4D, of any length, with at most LARGEST_STATE states a channel."""
    return None if dtype == torch.float32 else f"parameters of {dtype}"


def limit_of_cauchy(dtype: torch.dtype, rank: int) -> str | None:
    if dtype == torch.float32 and rank in (1, 2):
        return None
    return f"{dtype}, rank {rank}; it has float32 and rank 1 and 2"


VANDERMONDE_POLES = 16  # of a program of the backward, each of which reads the gradient


def limit_of_vandermonde(dtype: torch.dtype) -> str | None:
    return None if dtype == torch.float32 else f"{dtype}; it has float32"
