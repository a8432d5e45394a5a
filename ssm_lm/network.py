"""The network of a job: the address at which other nodes reach this one, and an all-reduce test over the job's ranks.

`python -m ssm_lm.network HOST [SECONDS]` prints, for the launchers in launch/, one line "interface address host_address
is_here": over which interface and from which own address HOST is reached, and whether HOST is this machine (1) or not
(0). SECONDS is how long to wait for HOST's name to be known; in Kubernetes that takes a while after the start.
`python -m ssm_lm.network watch ADDRESS PORT SECONDS` ends when ADDRESS has not answered for so long: see `watch`.

`ssm-lm doctor --network`, under a launcher, is `test_job`.
"""

import datetime
import json
import os
import socket
import statistics
import sys
import time
from typing import NamedTuple

from .errors import UserError, one_line
from .internals.python import leave

KIB, MIB = 1 << 10, 1 << 20
LINK_BYTES = 4 * MIB  # sent over every link of the ring
HOW_TO_RUN = (
    "one process has no network to test; start this under the job's launcher, as launch/torchrun.sh --network "
    "or torchrun --nproc_per_node 2 -m ssm_lm doctor --network"
)


class Route(NamedTuple):
    interface: str
    address: str  # own, on that interface
    host_address: str
    is_here: bool


def route_to(host: str, wait: float = 0.0) -> Route:
    """How `host` is reached from here. Nothing is sent.

    A name that resolves to a loopback address (Debian's /etc/hosts gives a machine's own name 127.0.1.1) is this
    machine; its address is then one that others can reach. Raises UserError for an unknown name, and where there is
    no route.
    """
    deadline = time.monotonic() + wait
    while True:
        try:
            family, _, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
            break
        except OSError as error:
            if time.monotonic() >= deadline:
                raise UserError(f"the host {host!r} is not known here ({error.strerror or error})") from error
            time.sleep(1)
    host_address = target[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(target)  # of a datagram socket: chooses the route, sends nothing
        except OSError as error:
            raise UserError(f"no route to {host} ({host_address}): {error.strerror or error}") from error
        own = probe.getsockname()[0]
    addresses = own_addresses()
    if _is_loopback(host_address) and host != host_address and host != "localhost":
        own = host_address = next((a for a in addresses if not _is_loopback(a)), own)
    interface = addresses.get(own)
    if interface is None:
        raise UserError(f"no interface has the address {own}, from which {host} is reached")
    return Route(interface, own, host_address, host_address in addresses)


def watch(address: str, port: int, patience: float) -> None:
    """Returns when the machine at `address` has been silent for `patience` seconds; a refused connection is an answer.

    A machine without power closes no connection, and torchrun's agents on the others wait for an answer of its store
    for ever, with their ranks long ended (torch 2.13).
    """
    heard = time.monotonic()
    while time.monotonic() - heard < patience:
        begun = time.monotonic()
        try:
            socket.create_connection((address, port), timeout=min(5.0, patience)).close()
            heard = time.monotonic()
        except ConnectionRefusedError:
            heard = time.monotonic()
        except OSError:
            pass
        time.sleep(max(0.0, begun + min(15.0, patience / 4) - time.monotonic()))


def own_addresses() -> dict[str, str]:
    """{address: interface} of this machine, without link-local IPv6."""
    import psutil

    return {
        entry.address: interface
        for interface, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family in (socket.AF_INET, socket.AF_INET6) and "%" not in entry.address
    }


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


# ---- the test over the ranks of a job


def test_job(timeout: float, as_json: bool) -> None:
    """All-reduce of growing sizes and a ring of sends over the ranks that a launcher started; rank 0 prints the result.

    No operation waits longer than `timeout` seconds: what fails is named on stderr, by rank, host and operation, and
    the process ends with exit code 1.
    """
    import torch
    import torch.distributed as dist

    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    on_gpu = torch.cuda.is_available()
    backend = "nccl" if on_gpu else "gloo"
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # a timeout is an exception here, not an abort elsewhere
    doing = _Doing()
    try:
        doing(f"joining the {ranks} ranks at {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}")
        dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout))
        doing("exchanging names")
        nodes: list = [None] * ranks
        dist.all_gather_object(nodes, _this_rank(device))
        largest = 256 * MIB if on_gpu else 16 * MIB
        sizes = [KIB << shift for shift in range(0, 20, 2) if KIB << shift <= largest]
        rows = []
        for size in sizes:
            doing(f"all-reduce of {_size(size)}")
            rows.append(_all_reduce(size, device, ranks))
        doing(f"sending {_size(LINK_BYTES)} around the ring of hosts")
        links = _ring(nodes, device, rank)
        doing("leaving")
        dist.barrier()
        dist.destroy_process_group()
    except Exception as error:  # whatever it was, the rank and the operation are what one needs to know
        message = one_line(error)[:300]
        print(
            f"ssm-lm: network test: rank {rank} on {socket.gethostname()} failed after {doing.seconds():.1f} s "
            f"of {doing.what}: {type(error).__name__}: {message}",
            file=sys.stderr,
            flush=True,
        )
        leave(1)  # the end of a broken process group can itself wait
    if rank == 0:
        report = {"backend": backend, "ranks": nodes, "all_reduce": rows, "links": links}
        print(json.dumps(report, indent=2) if as_json else describe(report), flush=True)


class _Doing:
    """What the test is at, and for how long."""

    def __call__(self, what: str) -> None:
        self.what, self.start = what, time.monotonic()

    def seconds(self) -> float:
        return time.monotonic() - self.start


def _this_rank(device) -> dict:
    # what the collectives use is what the launcher named, or else the way to rank 0
    import torch

    route = route_to(os.environ["MASTER_ADDR"])
    named = os.environ.get("NCCL_SOCKET_IFNAME" if device.type == "cuda" else "GLOO_SOCKET_IFNAME")
    return {
        "host": socket.gethostname(),
        "address": route.address,
        "interface": named or f"{route.interface} (the way to rank 0; none was named)",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }


def _all_reduce(size: int, device, ranks: int) -> dict:
    """Mean seconds of an all-reduce of `size` bytes, as the slowest rank saw it, and its bandwidths in bytes a second.

    algorithm bandwidth = size / seconds; bus bandwidth = that x 2 (n - 1) / n, what each link has carried, which does
    not depend on the number of ranks n and compares to the link's speed (the convention of nccl-tests).
    """
    import torch
    import torch.distributed as dist

    data = torch.zeros(size // 4, device=device)

    def seconds(repeats: int) -> float:
        dist.barrier()
        _synchronize(device)
        start = time.perf_counter()
        for _ in range(repeats):
            dist.all_reduce(data)
        _synchronize(device)
        slowest = torch.tensor([(time.perf_counter() - start) / repeats], device=device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        return slowest.item()

    seconds(1)  # connects
    repeats = max(1, min(50, int(0.3 / seconds(1))))  # the same on all ranks, for the time is
    mean = seconds(repeats)
    algorithm = size / mean
    return {
        "bytes": size,
        "seconds": mean,
        "algorithm_bandwidth": algorithm,
        "bus_bandwidth": algorithm * 2 * (ranks - 1) / ranks,
    }


def _ring(nodes: list[dict], device, rank: int) -> list[dict]:
    """Bandwidth of each host's link to the next (on one host: of each rank's), all at once: the slowest stands out."""
    import torch
    import torch.distributed as dist

    first_rank = {}
    for number, node in enumerate(nodes):
        first_rank.setdefault((node["host"], node["address"]), number)
    members = list(first_rank.values()) if len(first_rank) > 1 else list(range(len(nodes)))
    mine = 0.0
    for _ in range(2):  # the first connects
        dist.barrier()
        if rank in members:
            place = members.index(rank)
            after, before = members[(place + 1) % len(members)], members[place - 1]
            sent, received = (torch.zeros(LINK_BYTES // 4, device=device) for _ in range(2))
            _synchronize(device)
            start = time.perf_counter()
            works = dist.batch_isend_irecv(
                [dist.P2POp(dist.isend, sent, after), dist.P2POp(dist.irecv, received, before)]
            )
            for work in works:
                work.wait()
            _synchronize(device)
            mine = LINK_BYTES / (time.perf_counter() - start)
    speeds: list = [None] * len(nodes)
    dist.all_gather_object(speeds, mine)
    return [
        {"from": members[place - 1], "to": member, "bandwidth": speeds[member]} for place, member in enumerate(members)
    ]


def _synchronize(device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe(report: dict) -> str:
    """The report as text."""
    nodes = report["ranks"]
    lines = [f"{len(nodes)} ranks, backend {report['backend']}"]
    hosts: dict[tuple, list[int]] = {}
    for rank, node in enumerate(nodes):
        hosts.setdefault((node["host"], node["address"], node["interface"], node["device"]), []).append(rank)
    for (host, address, interface, device), ranks in hosts.items():
        which = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
        lines.append(f"  {which:<12} {host}  {address}  {interface}  {device}")
    lines.append(f"\n{'all-reduce':>10} {'time':>12} {'algorithm':>12} {'bus':>12}")
    for row in report["all_reduce"]:
        lines.append(
            f"{_size(row['bytes']):>10} {row['seconds'] * 1e6:>9,.0f} us "
            f"{_speed(row['algorithm_bandwidth']):>12} {_speed(row['bus_bandwidth']):>12}"
        )
    slowest = min(report["links"], key=lambda link: link["bandwidth"])
    median = statistics.median(link["bandwidth"] for link in report["links"])
    lines.append(
        f"\nslowest link: rank {slowest['from']} ({nodes[slowest['from']]['host']}) -> rank {slowest['to']} "
        f"({nodes[slowest['to']]['host']}), {_speed(slowest['bandwidth'])}; the median link has {_speed(median)}"
    )
    return "\n".join(lines)


def _size(count: int) -> str:
    return f"{count // MIB} MiB" if count >= MIB else f"{count // KIB} KiB"


def _speed(bytes_per_second: float) -> str:
    return f"{bytes_per_second / 1e9:.2f} GB/s" if bytes_per_second >= 1e9 else f"{bytes_per_second / 1e6:.1f} MB/s"


if __name__ == "__main__":
    if sys.argv[1] == "watch":
        watch(sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
        sys.exit()
    try:
        route = route_to(sys.argv[1], float(sys.argv[2]) if len(sys.argv) > 2 else 0.0)
    except UserError as error:
        sys.exit(f"ssm-lm: {error}")
    print(route.interface, route.address, route.host_address, int(route.is_here))
