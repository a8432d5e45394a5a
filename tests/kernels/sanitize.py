"""Runs the self-check of one operation's kernels under TileLens, on the CPU, and prints what it found as JSON:

    python tests/kernels/sanitize.py chunk_scan        an operation of the registry
    python tests/kernels/sanitize.py broken            kernels that are wrong on purpose, below

bounds: TileLens' sanitizer proves with a solver, for every program of a launch, that no address of a load or store is
    outside of the tensor that its pointer came from. Only addresses: a value that was never written goes unseen (the
    interpreted tests poison memory for that), and so does an element that belongs to another row.
races: TileLens' own race detector records accesses and draws no conclusions (3.1), so this reads the records of its
    tracer, which hold every address of every program: two programs of a launch that write to the same address, or one
    that reads what another writes, have a race, for nothing orders them; so has a program that reads back what it has
    stored, which other threads may have done. That is exact for the launches of the self-check, and says nothing of
    other shapes, of shared memory or of the warps inside a program, whose barriers the compiler places.
"""

import importlib
import json
import sys
from collections import defaultdict

import numpy as np
import tilelens
import torch
import triton
import triton.language as tl
from tilelens.clients import SymbolicClient, SymbolicExpr, Tracer
from tilelens.clients.sanitizer.sanitizer import SymbolicSanitizer
from tilelens.clients.symbolic_engine import JoinSymbolicExpr
from tilelens.core.data import Grid, Load, Store
from triton.runtime.interpreter import InterpreterBuilder

from ssm_lm.modeling.ssd_chunks import since_start_of_chunks, turns_of_chunks


@triton.jit
def unmasked_load_kernel(x, y, size, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i), mask=i < size)


@triton.jit
def unmasked_last_program_kernel(x, y, size, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(0) == 2:
        tl.store(y + i, 0.0)
    else:
        tl.store(y + i, tl.load(x + i, mask=i < size, other=0.0), mask=i < size)


@triton.jit
def overlapping_store_kernel(x, y, size, BLOCK: tl.constexpr):
    i = tl.program_id(0) * (BLOCK - 1) + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < size, other=0.0), mask=i < size)


@triton.jit
def neighbour_kernel(x, y, size, BLOCK: tl.constexpr):
    """In place, from the block before: a race unless the programs run one after the other, as the interpreter's do."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    before = tl.load(x + i - 1, mask=(i > 0) & (i < size), other=0.0)
    tl.store(x + i, before, mask=i < size)
    tl.store(y + i, before, mask=i < size)


@triton.jit
def read_back_kernel(x, y, size, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < size, other=0.0), mask=i < size)
    turned = tl.program_id(0) * BLOCK + BLOCK - 1 - tl.arange(0, BLOCK)
    tl.store(x + i, tl.load(y + turned, mask=turned < size, other=0.0), mask=i < size)


@triton.jit
def undropped(seed, quads, threshold, scale, SHAPE: tl.constexpr):
    return tl.zeros(SHAPE, tl.float32) + scale


@triton.jit
def unmoved(x, index):
    return x


def plain_turns(omega, decay, dt, T):
    return turns_of_chunks(*since_start_of_chunks(dt, decay, omega, T, T))


def plain_turns_backward(*gradients_and_system):
    """Of no use to what is looked for here."""
    return tuple(torch.zeros_like(x) for x in gradients_and_system[3:])


def broken(names: list[str]):
    """The module of what is wrong on purpose, the names of its kernels, and what launches them."""

    def launches():
        for name in names:
            globals()[name][(3,)](torch.randn(40), torch.empty(40), 40, BLOCK=16)

    return sys.modules[__name__], names, [launches]


def operation(name):
    """The same of an operation: every kernel that it ships, launched by its self-check."""
    module = importlib.import_module(f"ssm_lm.modeling.triton_{name}")
    listed = importlib.import_module(f"ssm_lm.bench.shipped.{name}")
    shipped = [case["kernel"] for arch in ("sm_90", "gfx942") for case in listed.compile_cases(arch)]
    names = [name for name, value in vars(module).items() if any(value is kernel for kernel in shipped)]
    cpu = torch.device("cpu")
    problems, more = [()], []
    if name == "chunk_scan":  # of real sizes unless they are told others: whole tiles of time, and masked ones
        problems = [(None, 12, None, 16), (torch.float32, 12, None, 12)]
        # TileLens knows no gather, and no address depends on what is moved
        module.rows_of = module.columns_of = unmoved
    elif name == "short_convolution":  # but for what documents add, all of its problems lie at the same addresses
        problems = module.PROBLEMS[:1]
    elif name in ("diagonal_operators", "diagonal_discretization"):
        problems = [(6,)]
    elif name in ("dplr_operators", "dplr_discretization"):
        problems = [(6, 2)]
    elif name == "ssd_system":
        problems, more = module.PROBLEMS[2:], [module.turns_case(cpu, 6).kernel]  # the scan's self-check has these
    elif name == "layer_norm":
        problems = module.PROBLEMS[2:]
    elif name == "dropout":
        problems = [module.PROBLEMS[i] for i in (1, 4, 7, 9)]
        module.factors = undropped  # TileLens knows no umulhi, and no address depends on what is drawn
    elif name == "ssd_scan":  # it launches ssd_system's kernels of turns too, which are traced there
        module.run_turns, module.run_turns_backward = plain_turns, plain_turns_backward
    cases = [case for problem in problems for case in module.self_check_cases(cpu, *problem)]
    return module, names, [case.kernel for case in cases if not case.label.startswith("turns")] + more


def traced(module, names, launches, make_client):
    """Run the launches with a client of TileLens around every kernel: kernel name -> client."""
    kernels = {name: getattr(module, name) for name in names}
    clients = {name: make_client() for name in names}
    for name in names:
        setattr(module, name, tilelens.trace(clients[name])(kernels[name]))
    for launch in launches:
        launch()
    for name, kernel in kernels.items():
        setattr(module, name, kernel)
    return clients


class EveryProgram(SymbolicSanitizer):
    """Checks every program of a launch by itself. As it comes, the sanitizer runs the first one alone, with symbols for
    the program's ids; a kernel's `if` on such an id then takes the first program's branch, for all of them.
    """

    def grid_idx_callback(self, grid_idx):
        super().grid_idx_callback(grid_idx)
        self.access_check_cache.clear()
        self.solver.reset()
        self.solver.add(self._addr_ok_premise())
        ids = (SymbolicExpr.PID0, SymbolicExpr.PID1, SymbolicExpr.PID2)
        self.solver.add(*(symbol == number for symbol, number in zip(ids, grid_idx, strict=True)))

    def pre_run_callback(self, fn):
        self.need_full_grid = True
        return SymbolicClient.pre_run_callback(self, fn)

    def post_run_callback(self, fn):
        self.need_full_grid = True
        return super().post_run_callback(fn)


class Joined(JoinSymbolicExpr):
    """Of two blocks, with the axis of two that joining adds; as it comes, it has the shape of one."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.shape = (*self.shape, 2)


SymbolicExpr.register_op_class(Joined, ("join",))


def bounds(module, names, launches) -> dict[str, list[str]]:
    """Kernel -> the accesses out of bounds, as source lines."""
    # the sanitizer's symbols know no erf, and no address depends on one
    original, InterpreterBuilder.create_erf = InterpreterBuilder.create_erf, lambda self, value: value
    clients = traced(module, names, launches, lambda: EveryProgram(abort_on_error=False))
    InterpreterBuilder.create_erf = original
    return {name: sorted({describe(record) for record in client.records}) for name, client in clients.items()}


def describe(record) -> str:
    frame = record.user_code_tracebacks[-1]
    return f"line {frame.lineno}: {frame.line_of_code}"


def addresses(record) -> np.ndarray:
    return np.unique(record.ptr + np.asarray(record.offsets)[np.asarray(record.masks, dtype=bool)])


def races(module, names, launches) -> tuple[dict[str, list[str]], dict[str, int]]:
    """Kernel -> its races, and kernel -> how many programs ran."""
    clients = traced(module, names, launches, Tracer)
    found, programs = {}, {}
    for name, client in clients.items():
        accesses = split_launches(client.records)
        programs[name] = sum(map(len, accesses))
        found[name] = sorted(set().union(*map(races_of_launch, accesses)))
    return found, programs


def split_launches(records) -> list[dict[tuple, list]]:
    """A launch begins where a program runs for the second time: launch -> {program: its loads and stores}."""
    launches, current = [], {}
    for record in records:
        if isinstance(record, Grid):
            if not launches or record.idx in launches[-1] or record.idx == (0, 0, 0):
                launches.append({})
            current = launches[-1].setdefault(record.idx, [])
        elif isinstance(record, (Load, Store)):
            current.append(record)
    return launches


def races_of_launch(programs: dict[tuple, list]) -> set[str]:
    found = set()
    writer: dict[int, tuple] = {}
    readers: dict[int, set[tuple]] = defaultdict(set)
    for program, accesses in programs.items():
        stored: set[int] = set()
        for access in accesses:
            touched = addresses(access).tolist()
            where = f"line {access.call_path[-1].lineno}" if access.call_path else "an access"
            if isinstance(access, Load):
                if not stored.isdisjoint(touched):
                    found.add(f"{where}: a program reads back what it has stored")
                for address in touched:
                    readers[address].add(program)
                continue
            stored.update(touched)
            for address in touched:
                if writer.setdefault(address, program) != program:
                    found.add(f"{where}: two programs store to one address")
    for address, program in writer.items():
        if readers[address] - {program}:
            found.add("a program reads what another one stores")
    return found


def main(name: str) -> None:
    torch.manual_seed(0)
    if name == "broken":
        names = [name for name in globals() if name.endswith("_kernel")]
        report = {"bounds": bounds(*broken(names))}
        # the tracer would leave the tensors in earnest
        report["races"], report["programs"] = races(*broken([name for name in names if "unmasked" not in name]))
    else:
        kernels = operation(name)
        report = {"bounds": bounds(*kernels)}
        report["races"], report["programs"] = races(*kernels)
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1])
