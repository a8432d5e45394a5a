"""Compile the shipped kernels for a GPU that is not there, and read what each asks of it.

Triton brings all that takes: its compiler knows every target, and ptxas, cuobjdump and nvdisasm lie in its wheel; for
AMD the assembly's own metadata says it. Nothing here needs a driver, or a GPU.
"""

import importlib
import pkgutil
import re
import subprocess
import tempfile
from typing import NamedTuple

from ..errors import UserError

# multiprocessors by compute capability: shared memory (KiB), shared memory a block (KiB), threads, blocks
NVIDIA = {
    80: (164, 163, 2048, 32),
    86: (100, 99, 1536, 16),
    87: (164, 163, 1536, 16),
    89: (100, 99, 1536, 24),
    90: (228, 227, 2048, 32),
    100: (228, 227, 2048, 32),
    103: (228, 227, 2048, 32),
    110: (228, 227, 1536, 24),
    120: (100, 99, 1536, 24),
    121: (100, 99, 1536, 24),
}
# matrix instructions from the first of them on
AMD = "gfx908 gfx90a gfx942 gfx950 gfx1100 gfx1101 gfx1102 gfx1150 gfx1151 gfx1200 gfx1201".split()
AMD_SHARED = 64 << 10
AMD_SHARED_GFX950 = 160 << 10

MATRIX_NVIDIA = re.compile(r"(?:[HIDQO]G?MMA|UTC\w*MMA)")
MATRIX_PTX = re.compile(r"\b(?:wgmma|tcgen05|mma)\.(?:mma|sync)")
MATRIX_AMD = re.compile(r"v_(?:mfma|smfmac|wmma|swmmac)")
SASS = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
GCN = re.compile(r"^\s+((?:v|s|ds|global|buffer|flat|scratch)_\w+)", re.MULTILINE)


class Resources(NamedTuple):
    """What one compiled kernel asks of one target."""

    registers: int  # a thread; on AMD the vector registers, accumulators included
    # instructions that move a register to local memory or back; on AMD vector registers kept in memory (a scalar
    # register that is kept in a lane of a vector register is not)
    spills: int
    stack: int  # bytes of local memory a thread
    shared: int  # bytes a block
    shared_limit: int  # bytes that a block may have
    occupancy: float  # warps that fit on a multiprocessor at once, of those that it could hold
    tensor_cores: int  # matrix instructions
    tensor_core_ops: str  # their names
    instructions: int
    tcgen05: bool  # Blackwell's tensor memory instructions


def parse_target(name: str):
    """ "sm_90" or "gfx942" as Triton's GPUTarget. Raises UserError for one that the kernels are not made for, on which
    LLVM would end the process.
    """
    from triton.backends.compiler import GPUTarget

    match = re.fullmatch(r"sm_(\d{2,3})a?", name)
    if match and int(match[1]) in NVIDIA:
        return GPUTarget("cuda", int(match[1]), 32)
    if name in AMD:
        return GPUTarget("hip", name, 64 if name.startswith("gfx9") else 32)
    known = ", ".join([f"sm_{capability}" for capability in NVIDIA] + AMD)
    raise UserError(f"--target {name}: not a target of the kernels; there are {known}")


def require_triton() -> None:
    """Raise UserError where Triton cannot compile: not installed, or set to interpret."""
    try:
        import triton
    except ImportError as error:
        raise UserError("Triton is not installed, which compiles the kernels: pip install 'ssm_lm[gpu]'") from error
    if triton.knobs.runtime.interpret:
        raise UserError("TRITON_INTERPRET is set, so that kernels are interpreted, not compiled: unset it")


def kernel_names() -> list[str]:
    """What has kernels: the names of modeling's files `triton_<name>.py`."""
    from .. import modeling

    names = [module.name for module in pkgutil.iter_modules(modeling.__path__)]
    return sorted(name.removeprefix("triton_") for name in names if name.startswith("triton_"))


def compile_cases(target: str) -> list[dict]:
    """The configurations of all kernels that are shipped for a target.

    Each file of shipped/ lists its kernel's in `compile_cases(target)`, from the table that the launcher uses. A case
    has name; kernel; arguments {name: type as Triton writes it, with ":16" where it is divisible by 16}; constexprs;
    options (num_warps, num_stages); tensor_cores, whether it must use them; work, of one launch at the shape of
    `roofline`: bytes, flops, tensor_flops, tensor_dtype, and tokens where they are not those of the shape.
    """
    require_triton()
    cases = []
    for name in kernel_names():
        listed = importlib.import_module(f".shipped.{name}", __package__).compile_cases(target)
        cases += [{"tensor_cores": False, "module": f"triton_{name}"} | case for case in listed]
    return cases


def compile_kernel(kernel, target: str, arguments: dict[str, str], constexprs: dict, options: dict):
    """A @triton.jit function compiled for a target, as Triton's CompiledKernel; from Triton's cache if it is there.

    arguments: name -> "*bf16:16", "i32", ...; constexprs: name -> value; options: num_warps, num_stages, ...
    """
    import triton
    from triton.compiler import ASTSource

    names = kernel.arg_names
    if set(names) != set(arguments) | set(constexprs):
        raise ValueError(
            f"{kernel.__name__}: {sorted(set(names) ^ (set(arguments) | set(constexprs)))} missing or unknown"
        )
    types = {name: arguments[name].split(":")[0] if name in arguments else "constexpr" for name in names}
    aligned = {
        (names.index(name),): [["tt.divisibility", int(kind.split(":")[1])]]
        for name, kind in arguments.items()
        if ":" in kind
    }
    values = {(names.index(name),): value for name, value in constexprs.items()}
    source = ASTSource(fn=kernel, signature=types, constexprs=values, attrs=aligned)
    return triton.compile(source, target=parse_target(target), options=options)


def compile_case(case: dict, target: str, disassembled: bool = True) -> Resources:
    """Compile a case of `compile_cases` and read its resources."""
    compiled = compile_kernel(case["kernel"], target, case["arguments"], case["constexprs"], case["options"])
    return resources(compiled, disassembled)


def resources(compiled, disassembled: bool = True) -> Resources:
    """Of a CompiledKernel, for either vendor. disassembled: False saves NVIDIA's disassembler, which takes as long as
    the compiler: instructions are 0, those for matrices are PTX's, and a kernel without a stack has no spills.
    """
    target = compiled.metadata.target
    return _nvidia(compiled, target.arch, disassembled) if target.backend == "cuda" else _amd(compiled, target.arch)


def _nvidia(compiled, capability: int, disassembled: bool) -> Resources:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _output([knobs.nvidia.cuobjdump.path, "-res-usage", file.name])
        registers, stack = (int(re.search(rf"{field}:(\d+)", usage)[1]) for field in ("REG", "STACK"))
        operations = []
        if disassembled or stack:  # without its analysis of branches, which takes a third of the time
            operations = SASS.findall(_output([knobs.nvidia.nvdisasm.path, "-c", "-ndf", file.name]))
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    per_multiprocessor, per_block, threads, blocks = NVIDIA[capability]
    by_registers = 65536 // (-(-registers * 32 // 256) * 256 * warps)  # given out in units of 256 a warp
    by_shared = (per_multiprocessor << 10) // (shared + 1024)  # the system keeps 1 KiB a block
    resident = min(by_registers, by_shared, threads // (32 * warps), blocks) * warps
    tensor = [operation for operation in operations if MATRIX_NVIDIA.match(operation)]
    if not operations:
        tensor = MATRIX_PTX.findall(compiled.asm["ptx"])
    return Resources(
        registers=registers,
        spills=sum(operation.startswith(("LDL", "STL")) for operation in operations),
        stack=stack,
        shared=shared,
        shared_limit=per_block << 10,
        occupancy=round(resident * 32 / threads, 3),
        tensor_cores=len(tensor),
        tensor_core_ops=_names(operation.split(".")[0] for operation in tensor),
        instructions=len(operations),
        tcgen05="tcgen05" in compiled.asm["ptx"],
    )


def _amd(compiled, arch: str) -> Resources:
    assembly = compiled.asm["amdgcn"]

    def field(name):
        return int(re.search(rf"\.{name}:\s*(\d+)", assembly)[1])

    operations = GCN.findall(assembly)
    tensor = [operation for operation in operations if MATRIX_AMD.match(operation)]
    waves = int(re.search(r"; Occupancy: (\d+)", assembly)[1])
    return Resources(
        registers=field("vgpr_count"),
        spills=field("vgpr_spill_count"),
        stack=field("private_segment_fixed_size"),
        shared=compiled.metadata.shared,
        shared_limit=AMD_SHARED_GFX950 if arch == "gfx950" else AMD_SHARED,
        occupancy=round(waves / (8 if arch.startswith("gfx9") else 16), 3),
        tensor_cores=len(tensor),
        tensor_core_ops=_names(re.match(r"v_[a-z]+", operation)[0] for operation in tensor),
        instructions=len(operations),
        tcgen05=False,
    )


def _names(names) -> str:
    return ", ".join(sorted(set(names)))


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
