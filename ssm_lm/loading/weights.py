"""Whether weights are those of a model, by the names, shapes and dtypes in the headers of their files.

No tensor is read and nothing is allocated, so no number in a file can ask for more memory or time than its weights are
worth.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..errors import UserError, one_line
from .folder import CONFIG, INDEX, WEIGHTS, read_json

# as headers of safetensors call what a model's weights are
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_headers(folder: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """{name: (shape, dtype)} of all weights, from the headers of the files; UserError for a damaged one."""
    if (folder / WEIGHTS).is_file():
        named = None
        files = [folder / WEIGHTS]
    elif (folder / INDEX).is_file():
        named = read_json(folder / INDEX).get("weight_map")
        if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
            raise UserError(f"{folder / INDEX}: not an index of weights: weight_map maps names to files")
        files = [folder / name for name in sorted(set(named.values()))]
        for file in files:
            if file.parent != folder or file.suffix != ".safetensors":
                raise UserError(f"{folder / INDEX}: names {file.name!r}, which is no safetensors file of the folder")
    else:
        pickles = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
        pickles = [file.name for file in pickles if file.name != "training_args.bin"]
        if pickles:
            raise UserError(
                f"{folder}: the weights are pickled ({pickles[0]}), and a pickle can run code; "
                f"convert them to {WEIGHTS} first"
            )
        raise UserError(f"{folder / WEIGHTS}: no such file; the folder holds a config without weights")
    headers = {}
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: no such file, and {INDEX} names it; copy the folder again")
        try:
            with safe_open(file, "pt") as tensors:  # checks the header against the length of the file
                for key in tensors.keys():
                    tensor = tensors.get_slice(key)
                    headers[key] = tuple(tensor.get_shape()), tensor.get_dtype()
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: truncated or damaged ({one_line(error)}); copy it again") from error
    if named is not None and named.keys() != headers.keys():
        key = min(named.keys() ^ headers.keys())
        raise UserError(f"{folder / INDEX}: {key!r} is not in both the index and the files; copy the folder again")
    return headers


@dataclass(frozen=True)
class FlatTensor:
    """A tensor of a safetensors file, flattened, that is read in slices: what is not asked for is not read.

    first: the byte in the file where its numbers begin; count: how many there are.
    """

    file: Path
    dtype: torch.dtype
    first: int
    count: int

    def __call__(self, part: slice) -> torch.Tensor:
        """The numbers of a slice of step 1, (n,)."""
        start, stop, _ = part.indices(self.count)
        size = self.dtype.itemsize
        with open(self.file, "rb") as file:
            file.seek(self.first + start * size)
            read = bytearray(file.read((stop - start) * size))
        return torch.frombuffer(read, dtype=self.dtype) if read else torch.empty(0, dtype=self.dtype)


def flat_weights(folder: Path) -> dict[str, FlatTensor]:
    """{name: what reads it} of all weights of a folder whose headers `read_headers` has checked."""
    found = {}
    index = {} if (folder / WEIGHTS).is_file() else read_json(folder / INDEX)["weight_map"]
    for name in sorted(set(index.values())) or [WEIGHTS]:
        with open(folder / name, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for key, said in header.items():
            dtype, (begin, end) = FLOATS[said["dtype"]], said["data_offsets"]
            found[key] = FlatTensor(folder / name, dtype, 8 + length + begin, (end - begin) // dtype.itemsize)
    return found


LONGEST_CHUNK = 512  # a chunk's products are quadratic in it: 4096 tokens ask for gigabytes a layer


def check_counts(folder: Path, values: dict, headers: dict) -> None:
    """Refuse counts that the weights cannot have, and building the model would loop over; and a chunk_size that no
    model needs, and running it would pay for.
    """
    chunk_size = values.get("chunk_size")
    if isinstance(chunk_size, (int, float)) and chunk_size > LONGEST_CHUNK:
        raise UserError(
            f"{folder / CONFIG}: chunk_size {chunk_size} costs gigabytes and is not faster than a small one; set it to "
            f"{LONGEST_CHUNK} or less, 64 by default: the model's numbers do not depend on it"
        )
    largest = max((size for shape, _ in headers.values() for size in shape), default=0)
    for key, limit in (
        ("num_hidden_layers", len(headers)),
        ("n_layer", len(headers)),
        ("adaptive_cutoffs", len(headers)),
        ("adaptive_div_val", largest),
        ("num_labels", largest),
    ):
        value = values.get(key)
        value = len(value) if isinstance(value, list) else value
        if isinstance(value, (int, float)) and value > max(limit, 4):
            raise UserError(f"{folder}: the weights do not fit {CONFIG}: {key} is too large, for they hold {limit}")


def check_fit(folder: Path, model, headers: dict) -> None:
    """Hold the headers of the weights against the parameters and buffers of the model, which is on the meta device."""
    wanted = model.state_dict(keep_vars=True)
    if not any(key.startswith(f"{model.base_model_prefix}.") for key in headers):  # saved from the base model
        headers = {f"{model.base_model_prefix}.{key}": header for key, header in headers.items()}
    present = {id(wanted[key]) for key in headers if key in wanted}  # tied parameters are one
    _refuse(folder, "of dtype", [f"{key} ({dtype})" for key, (_, dtype) in headers.items() if dtype not in FLOATS])
    mismatched = [
        f"{key} is {_shape(shape)}, not {_shape(wanted[key].shape)}"
        for key, (shape, _) in headers.items()
        if key in wanted and shape != tuple(wanted[key].shape)
    ]
    _refuse(folder, "of another shape", mismatched)
    _refuse(folder, "missing", [key for key, tensor in wanted.items() if id(tensor) not in present])
    _refuse(folder, "unexpected", headers.keys() - wanted.keys())


def check_loaded(folder: Path, found: dict) -> None:
    """Refuse what transformers reports and passes over: it draws such parameters at random."""
    _refuse(folder, "of another shape", [key for key, *_ in found["mismatched_keys"]])
    _refuse(folder, "missing", found["missing_keys"])
    _refuse(folder, "unexpected", found["unexpected_keys"])


def _refuse(folder: Path, what: str, keys) -> None:
    if keys:
        others = f", and {len(keys) - 1} more" if len(keys) > 1 else ""
        raise UserError(f"{folder}: the weights do not fit {CONFIG}: {what}: {min(keys)}{others}")


def _shape(shape) -> str:
    return "x".join(map(str, shape))
