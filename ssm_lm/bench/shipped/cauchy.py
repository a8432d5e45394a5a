"""The configurations of the Cauchy products that are shipped, with what one launch of each moves and computes."""

from ...modeling.triton_cauchy import (
    BACKWARD,
    BLOCK_N,
    FORWARD,
    RANKS,
    cauchy_backward_kernel,
    cauchy_forward_kernel,
)


def compile_cases(target: str) -> list[dict]:
    """The configurations that are shipped for `target`."""
    pointer, cases = "*fp32:16", []
    for rank in RANKS:
        products, sums = (1 + rank) ** 2, 9 if rank == 1 else 16
        common = dict.fromkeys(("C", "B", "P", "Lambda_re", "Lambda_im", "rate", "inverse_scale", "nodes"), pointer)
        sizes = {"L": "i32", "HALF": "i32:16", "n_ssm": "i32"}
        H, half, nodes = 1024, 32, 4096  # of the roofline's shape
        block, warps = FORWARD[rank]
        cases.append(
            {
                "name": f"cauchy_forward rank {rank}",
                "kernel": cauchy_forward_kernel,
                "arguments": common | {"out": pointer} | sizes,
                "constexprs": {"RANK": rank, "BLOCK": block},
                "options": {"num_warps": warps, "num_stages": 1},
                # a node and pole: 23 of the resolvent, and 8 of a product with both V and W, 4 of one with either
                "work": {
                    "bytes": 8 * H * products * nodes + 4 * H * 2 * half,
                    "flops": H * nodes * half * (23 + (28 if rank == 1 else 56)),
                },
            }
        )
        rows, warps = BACKWARD[rank]
        cases.append(
            {
                "name": f"cauchy_backward rank {rank}",
                "kernel": cauchy_backward_kernel,
                "arguments": common | {"grad": pointer, "sums": pointer} | sizes | {"H": "i32:16", "splits": "i32"},
                "constexprs": {"RANK": rank, "ROWS": rows, "BLOCK": BLOCK_N},
                "options": {"num_warps": warps, "num_stages": 1},
                # beside the resolvent 14 of Y and Z, 16 of a and b; 7 or 14 sums, and what weighs g
                "work": {
                    "bytes": 8 * H * products * nodes + 4 * H * (2 + sums) * half,
                    "flops": H * nodes * half * (53 + (28 + 28 if rank == 1 else 58 + 60)),
                },
            }
        )
    return cases
