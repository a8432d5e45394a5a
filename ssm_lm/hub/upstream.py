"""What a state_dict of state-spaces/s4 means: names, shapes and signs of three versions, as parameters of this package.

The language model: adaptive embedding, blocks [S4, S4, FFN] (or [S4, FFN]), norm, adaptive softmax. A state space is

    A = diag(Lambda) - P P^*,  bilinear with step dt,  y = 2 Re(C x) + D u

    version   keys of a layer      Lambda                                 dt                 C
    v4        ...layer.layer.      -exp(A_real) - i A_imag                exp(inv_dt)        C~ of length l_kernel
    v3        ...layer.            -exp(inv_w_real) + i w_imag            exp(log_dt)        C~ of length L
    v1        ...layer.            w                                      exp(log_dt)        conj(C~) of length l_max

The length is 0 in a model that never ran; then C itself is stored. Otherwise C~ = C (I - A_bar^L) is what makes the
generating function of the kernel end after L taps; it is undone here, once, in float64, for L as the file says. The
convolution of upstream forgets what is more than l_max tokens back; a model of this package does not.

v1 keeps A = diag(w) - p q^* with p and q apart, and a norm with a shift that no LayerNorm has. Where training has moved
these (p = q and no shift at its start), there is no model of this package that computes the same, and it is refused.

A file does not say how much dropout there was. v4 has it twice in an S4 block, before and after the activation,
v3 and this package after it: of interest to who goes on training.

Sources: the checkpoints and the repository, github.com/state-spaces/s4, at v1, v3.0.0 and v4.
"""

import re
from typing import NamedTuple

import torch

from ..errors import UserError
from ..modeling.configuration_s4 import ARCHITECTURES

VERSIONS = ("v1", "v3", "v4")

# a key that only a layer of this version has
MARKS = {"v1": "layer.kernel.krylov.log_dt", "v3": "layer.kernel.kernel.log_dt", "v4": "layer.layer.kernel.inv_dt"}

# derived from others, or copies of them that a check below or upstream's own code makes equal
DERIVED = re.compile(r"loss_val\..*|.*\.krylov\.(nodes|z|omega)|.*\.kernel\.(omega|z)")


class StateDict:
    """The tensors of a file, taken one by one and checked, so that none is missing and none is left over."""

    def __init__(self, tensors: dict[str, torch.Tensor], where: str):
        self.tensors, self.where, self.taken = tensors, where, set()

    def __contains__(self, key: str) -> bool:
        return key in self.tensors

    def take(self, key: str, *shape: int | None) -> torch.Tensor:
        """The tensor `key` of this shape (None: any size); UserError if it is not there, or not that, or not finite."""
        if key not in self.tensors:
            raise UserError(
                f"{self.where}: the key {key!r} is missing; it is no whole checkpoint of the language model"
            )
        tensor = self.tensors[key]
        self.taken.add(key)
        fits = len(shape) == tensor.dim() and all(
            want in (None, has) for want, has in zip(shape, tensor.shape, strict=True)
        )
        if not fits:
            wanted = " x ".join("any" if size is None else str(size) for size in shape) or "one number"
            raise UserError(f"{self.where}: {key} has the shape {tuple(tensor.shape)}, and {wanted} is needed")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"{self.where}: {key} holds values that are not finite")
        return tensor

    def check_copy(self, key: str, original: torch.Tensor) -> None:
        """Take `key` if it is there; UserError unless it equals `original`, which it is an alias of."""
        if key in self and not torch.equal(self.take(key, *original.shape), original):
            raise UserError(f"{self.where}: {key} should be a copy of another key and is not")

    def check_empty(self) -> None:
        """UserError for the first key that nobody took."""
        left = sorted(key for key in self.tensors if key not in self.taken and not DERIVED.fullmatch(key))
        if left:
            raise UserError(f"{self.where}: the key {left[0]!r} has no place in the language model ({len(left)} such)")


class StoredSystem(NamedTuple):
    """A state space as a file holds it, the signs and names of the versions undone; complex128 and float64.

    log_dt (H,); log_re (S, N/2), Lambda = -exp(log_re) + i im; im, P, B (S, N/2); C (H, N/2), which is C~ if
    length > 0; D (H,). Channel h takes copy h mod S.
    """

    log_dt: torch.Tensor
    log_re: torch.Tensor
    im: torch.Tensor
    P: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    D: torch.Tensor
    length: int


def detect_version(tensors: dict[str, torch.Tensor], where: str, expected: str = "auto") -> str:
    """The version whose layers are in the file; UserError if there are none, or another one was expected."""
    found = [version for version, mark in MARKS.items() if any(key.endswith(mark) for key in tensors)]
    if len(found) != 1:
        raise UserError(
            f"{where}: holds no S4 layers of {', '.join(VERSIONS)}: it is no language model of state-spaces/s4"
        )
    if expected not in ("auto", found[0]):
        raise UserError(f"{where}: is a checkpoint of {found[0]}, not of {expected}; leave --version at auto")
    return found[0]


def translate(
    tensors: dict[str, torch.Tensor], where: str, version: str = "auto", l_max: int | None = None
) -> tuple[dict, dict[str, torch.Tensor]]:
    """(keys of S4Config, state_dict of S4ForCausalLM) of an upstream state_dict.

    where: how messages call the file. l_max: the length that C~ belongs to, where the file does not say.
    Raises UserError for whatever is missing, left over, of the wrong shape, or not representable.
    """
    version = detect_version(tensors, where, version)
    source = StateDict(tensors, where)
    blocks = block_kinds(tensors, where)
    arch = architecture(blocks, where)
    kinds = ARCHITECTURES[arch]
    config, weights = translate_vocabulary(source)
    H = config["hidden_size"]
    config |= {"arch": arch, "num_hidden_layers": len(blocks) // len(kinds), "ssm": "s4", "discretization": "bilinear"}
    # v1 divides by the plain standard deviation
    config |= {"hidden_act": "gelu", "layer_norm_epsilon": 1e-12 if version == "v1" else 1e-5}
    for index, kind in enumerate(blocks):
        theirs = f"model.layers.{index}."
        ours = f"model.layers.{index // len(kinds)}.sublayers.{index % len(kinds)}."
        norm = translate_norm(source, f"{theirs}norm.", H, version)
        weights |= {f"{ours}norm.{key}": value for key, value in norm.items()}
        if kind == "ffn":
            up, down = f"{theirs}layer.ff.0.0.", f"{theirs}layer.ff.2."
            weights[f"{ours}inner.up_proj.weight"] = source.take(f"{up}weight", None, H)
            width = config["intermediate_size"] = len(weights[f"{ours}inner.up_proj.weight"])
            weights[f"{ours}inner.up_proj.bias"] = take_bias(source, f"{up}bias", width)
            weights[f"{ours}inner.down_proj.weight"] = source.take(f"{down}weight", H, width)
            weights[f"{ours}inner.down_proj.bias"] = take_bias(source, f"{down}bias", H)
            continue
        glu = f"{theirs}layer.output_linear.0."
        weights[f"{ours}inner.out_proj.weight"] = source.take(f"{glu}weight", 2 * H, H)
        weights[f"{ours}inner.out_proj.bias"] = take_bias(source, f"{glu}bias", 2 * H)
        system = READERS[version](source, f"{theirs}layer.", H, l_max)
        config["n_ssm"], config["state_size"] = len(system.B), 2 * system.B.shape[-1]
        ssm = to_parameters(system, f"{where}: layer {index}")
        weights |= {f"{ours}inner.ssm.{key}": value for key, value in ssm.items()}
    weights |= {f"model.norm.{key}": value for key, value in translate_norm(source, "model.norm.", H, version).items()}
    source.check_empty()
    return config, weights


def block_kinds(tensors: dict, where: str) -> list[str]:
    """["ssm", "ssm", "ffn", ...]: what each model.layers.{i} is."""
    found = {}
    for key in tensors:
        match = re.match(r"model\.layers\.(\d+)\.(layer\.ff\.)?", key)
        if match:
            index = int(match[1])
            found[index] = "ffn" if match[2] else found.get(index, "ssm")
    if sorted(found) != list(range(len(found))):
        missing = next(index for index in range(len(found) + 1) if index not in found)
        raise UserError(f"{where}: block {missing} of {max(found) + 1} is missing")
    return [found[index] for index in range(len(found))]


def architecture(blocks: list[str], where: str) -> str:
    """The name of the stack in S4Config; UserError for another one."""
    for name, kinds in ARCHITECTURES.items():
        if blocks and blocks == list(kinds) * (len(blocks) // len(kinds)):
            return name
    raise UserError(
        f"{where}: the blocks are {', '.join(blocks[:6])}, ...; only whole [S4, S4, FFN] or [S4, FFN] are known"
    )


def translate_vocabulary(source: StateDict) -> tuple[dict, dict[str, torch.Tensor]]:
    """Adaptive embedding and softmax: the keys of S4Config that they fix, and their parameters."""
    count = sum(1 for key in source.tensors if re.fullmatch(r"encoder\.0\.emb_layers\.\d+\.weight", key))
    first = source.take("encoder.0.emb_layers.0.weight", None, None)
    H = first.shape[1]
    if count < 2:
        raise UserError(f"{source.where}: has no clusters of words (encoder.0.emb_layers.1.weight and so on)")
    div_val = H // max(1, source.take("encoder.0.emb_layers.1.weight", None, None).shape[1])
    untied = "loss.out_layers_weights.0" in source
    tied_projections = "loss.out_projs.1" not in source
    weights, sizes = {}, []
    for i in range(count):
        d = H // div_val**i
        E = source.take(f"encoder.0.emb_layers.{i}.weight", None, d)
        sizes.append(len(E))
        projection = source.take(f"encoder.0.emb_projs.{i}", H, d)
        source.check_copy(f"loss.shared_out_projs.{i}", projection)
        weights[f"model.embed_tokens.weight_{i}"] = E
        weights[f"model.embed_tokens.projection_{i}"] = projection
        weights[f"lm_head.weight_{i}"] = source.take(f"loss.out_layers_weights.{i}", len(E), d) if untied else E
        weights[f"lm_head.bias_{i}"] = source.take(f"loss.out_layers_biases.{i}", len(E))
        own = i == 0 or not tied_projections
        weights[f"lm_head.projection_{i}"] = source.take(f"loss.out_projs.{i}", H, d) if own else projection
    # upstream counts the tails from the end: cluster 1 is the last column of the first softmax
    weights["lm_head.cluster_weight"] = source.take("loss.cluster_weight", count - 1, H).flip(0)
    weights["lm_head.cluster_bias"] = source.take("loss.cluster_bias", count - 1).flip(0)
    config = {
        "vocab_size": sum(sizes),
        "hidden_size": H,
        "adaptive_cutoffs": [sum(sizes[: i + 1]) for i in range(count - 1)],
        "adaptive_div_val": div_val,
        "adaptive_tie_projections": tied_projections,
        "tie_word_embeddings": not untied,
        "bos_token_id": 0,  # <eos>, the first word of upstream's vocabulary
        "eos_token_id": 0,
    }
    return config, weights


def translate_norm(source: StateDict, prefix: str, H: int, version: str) -> dict[str, torch.Tensor]:
    """weight and bias of a LayerNorm. v1: s (x - mean + m) / deviation with two numbers, a LayerNorm where m is 0."""
    if version != "v1":
        return {key: source.take(f"{prefix}norm.{key}", H) for key in ("weight", "bias")}
    m, s = (source.take(f"{prefix}norm.{key}", 1) for key in ("m", "s"))
    if m.abs().item() > 1e-6:
        raise UserError(
            f"{source.where}: {prefix}norm.m is {m.item():.3g}: a shift that no LayerNorm has; only 0 converts"
        )
    return {"weight": s.expand(H), "bias": torch.zeros(H)}


def take_bias(source: StateDict, key: str, size: int) -> torch.Tensor:
    """(size,), which v1 stores as (size, 1)."""
    if key in source and source.tensors[key].dim() == 2:
        return source.take(key, size, 1)[:, 0]
    return source.take(key, size)


# ---- state spaces


def as_complex(pairs: torch.Tensor) -> torch.Tensor:
    return torch.view_as_complex(pairs.double().contiguous())


def take_length(source: StateDict, key: str, l_max: int | None) -> int:
    """The length that C~ belongs to; l_max stands in for a file without it and must not contradict one that has it."""
    if key not in source:
        if l_max is None:
            raise UserError(f"{source.where}: does not say for which length its kernels are; give it with --l-max N")
        return l_max
    length = int(source.take(key).item())
    if length < 0 or (length and l_max is not None and l_max != length):
        raise UserError(f"{source.where}: {key} is {length}, not the {l_max} of --l-max")
    return length


def read_v4(source: StateDict, prefix: str, H: int, l_max: int | None) -> StoredSystem:
    kernel = f"{prefix}layer.kernel."
    log_re = source.take(f"{kernel}A_real", None, None).double()
    S, half = log_re.shape
    return StoredSystem(
        log_dt=source.take(f"{kernel}inv_dt", H, 1)[:, 0].double(),
        log_re=log_re,
        im=-source.take(f"{kernel}A_imag", S, half).double(),
        P=as_complex(source.take(f"{kernel}P", 1, S, half, 2))[0],
        B=as_complex(source.take(f"{kernel}B", 1, S, half, 2))[0],
        C=as_complex(source.take(f"{kernel}C", 1, H, half, 2))[0],
        D=source.take(f"{prefix}layer.D", 1, H)[0].double(),
        length=take_length(source, f"{kernel}l_kernel", l_max),
    )


def read_v3(source: StateDict, prefix: str, H: int, l_max: int | None) -> StoredSystem:
    kernel = f"{prefix}kernel.kernel."
    name = "log_w_real" if f"{kernel}log_w_real" in source else "inv_w_real"
    log_re = source.take(f"{kernel}{name}", None, None).double()
    S, half = log_re.shape
    return StoredSystem(
        log_dt=source.take(f"{kernel}log_dt", H).double(),
        log_re=log_re,
        im=source.take(f"{kernel}w_imag", S, half).double(),
        P=as_complex(source.take(f"{kernel}P", 1, S, half, 2))[0],
        B=as_complex(source.take(f"{kernel}B", 1, S, half, 2))[0],
        C=as_complex(source.take(f"{kernel}C", 1, H, half, 2))[0],
        D=source.take(f"{prefix}D", 1, H)[0].double(),
        length=take_length(source, f"{kernel}L", l_max),
    )


def read_v1(source: StateDict, prefix: str, H: int, l_max: int | None) -> StoredSystem:
    kernel = f"{prefix}kernel.krylov."
    w = as_complex(source.take(f"{kernel}w", None, 2))
    half = len(w)
    B, p = as_complex(source.take(f"{kernel}B", H, 2, half, 2)).unbind(1)
    C, q = as_complex(source.take(f"{kernel}C", H, 2, half, 2)).unbind(1)
    if not (w.real < 0).all():
        raise UserError(f"{source.where}: {kernel}w has a real part that is not negative: an unstable state space")
    if (p - q).abs().max() > 1e-5 * p.abs().max():
        raise UserError(
            f"{source.where}: {prefix}kernel has A = diag(w) - p q^* with p and q apart, and here they are one; "
            "convert a checkpoint of v3 or v4"
        )
    if l_max is None and f"{kernel}nodes" in source:
        l_max = 2 * (len(source.tensors[f"{kernel}nodes"]) - 1)  # L/2 + 1 of them
    return StoredSystem(
        log_dt=source.take(f"{kernel}log_dt", H).double(),
        log_re=(-w.real).log().expand(H, -1),
        im=w.imag.expand(H, -1),
        P=p,
        B=B,
        C=C.conj(),
        D=source.take(f"{prefix}D", H).double(),
        length=take_length(source, f"{kernel}L", l_max),
    )


READERS = {"v1": read_v1, "v3": read_v3, "v4": read_v4}


def to_parameters(system: StoredSystem, where: str) -> dict[str, torch.Tensor]:
    """The parameters of `ssm_lm.modeling.ssm.S4`, float32."""
    C = system.C
    if system.length:
        C = untruncate(system)
        if not torch.isfinite(torch.view_as_real(C)).all():
            raise UserError(f"{where}: C cannot be recovered from C~: I - A_bar^{system.length} is singular")
    parameters = {
        "log_dt": system.log_dt,
        "Lambda_log_re": system.log_re,
        "Lambda_im": system.im,
        "P": torch.cat([system.P.real, system.P.imag], -1)[None],
        "B": torch.cat([system.B.real, system.B.imag], -1),
        "C": torch.cat([C.real, C.imag], -1),
        "D": system.D,
    }
    return {key: value.float().contiguous() for key, value in parameters.items()}


def untruncate(system: StoredSystem, channels: int = 128) -> torch.Tensor:
    """C (H, N/2) complex128 from C~ = C (I - A_bar^L), on real states [Re x | Im x], `channels` of them at a time.

    There y = row . x with row = 2 [Re C | -Im C], and A = [[Re Lambda, -Im Lambda], [Im Lambda, Re Lambda]] - 2 p p^T
    with p = [Re P | Im P].
    """
    half = system.B.shape[-1]
    re, im = torch.diag_embed(-system.log_re.exp()), torch.diag_embed(system.im)
    p = torch.cat([system.P.real, system.P.imag], -1)
    A = torch.cat([torch.cat([re, -im], -1), torch.cat([im, re], -1)], -2) - 2 * p[:, :, None] * p[:, None]
    rows = torch.cat([system.C.real, -system.C.imag], -1)
    eye = torch.eye(2 * half, dtype=torch.float64)
    recovered = []
    # 64 x 64 matrices are too small to share: one thread took a second a layer of the WikiText-103 model, two took 14
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for start in range(0, len(rows), channels):
        row = rows[start : start + channels]
        copies = torch.arange(start, start + len(row)) % len(A)
        step = system.log_dt[start : start + channels].exp()[:, None, None] / 2 * A[copies]
        A_bar = torch.linalg.solve_ex(eye - step, eye + step).result
        power = torch.linalg.matrix_power(A_bar, system.length)
        # row~ = row (I - A_bar^L): a system with the transpose
        recovered.append(torch.linalg.solve_ex((eye - power).mT, row[..., None]).result[..., 0])
    torch.set_num_threads(threads)
    real, minus_imag = torch.cat(recovered).chunk(2, -1)
    return torch.complex(real, -minus_imag)
