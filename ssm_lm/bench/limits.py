"""What bounds a step on this machine, measured beside it: the reading of memory for a token of decoding, the matrix
product for training.

    share of the limit = (bytes that a token has to read) / seconds / (bytes/s of reading a buffer of that size)
                       = (FLOPs of forward and backward)  / seconds / (FLOP/s of one large matrix product)
"""

import torch
from torch import nn

from ..costs.baselines import baseline_flops
from ..costs.flops import total, training_flops
from ..modeling.configuration_s4 import S4Config
from .timing import host_seconds

CPU = torch.device("cpu")
TRIES = 5
MATRIX = {"cpu": 1024, "cuda": 8192}  # rows and columns of the product


def bytes_of_a_token(model: nn.Module, cache) -> int:
    """What a step over one token of every row reads at least: each weight once, but for tables of which it reads rows,
    and what is in the cache, keys and values or states."""
    head = model.get_output_embeddings().weight
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding) and m.weight is not head}
    weights = (p for p in model.parameters() if id(p) not in tables)
    held = (tensor for layer in cache.layers for tensor in _tensors(vars(layer)))
    return sum(tensor.numel() * tensor.element_size() for tensor in (*weights, *held))


def _tensors(held) -> list[torch.Tensor]:
    if torch.is_tensor(held):
        return [held]
    parts = held.values() if isinstance(held, dict) else held if isinstance(held, (list, tuple)) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def read_bandwidth(size: int, device: torch.device = CPU) -> float:
    """Bytes/s of reading `size` bytes in a row, with torch's threads or on a GPU, the best of some tries."""
    buffer = torch.ones(max(1, size // 4), device=device)
    return 4 * len(buffer) / _best(lambda: torch.dot(buffer, buffer), device)


def matrix_product(dtype: torch.dtype, device: torch.device = CPU) -> float:
    """FLOP/s of one large matrix product of numbers of that dtype, on the same terms."""
    size = MATRIX[device.type]
    a = torch.ones(size, size, dtype=dtype, device=device)
    return 2 * size**3 / _best(lambda: a @ a, device)


def flops_of_a_step(config, batch: int, length: int) -> float:
    """Of forward and backward over `batch` sequences of `length` tokens."""
    count = training_flops if isinstance(config, S4Config) else baseline_flops
    return total(count(config, batch, length))


def _best(run, device: torch.device) -> float:
    run()
    return min(host_seconds(run, device) for _ in range(TRIES))
