"""Time the cores in one process on one thread, as ratios that can be compared between machines.

python -m benchmarks.core_speed --repeats 15
python -m benchmarks.core_speed --device cuda       # with cuDNN and mamba-ssm's kernels

Each line times two computations alternately. It prints both medians and the median ratio of neighbouring runs.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.device import device_here, device_name, finish
from cyborg_torchrl.collectors.runtime import prepare_cpu
from cyborg_torchrl.cores import (
    Core,
    Mamba2Block,
    MambaBlock,
    build_attention,
    build_bistable,
    build_ffm,
    build_gated_delta,
    build_gru,
    build_lru,
    build_lstm,
    build_min_gru,
    build_rnn,
    selective_scan,
)
from cyborg_torchrl.cores.kernels.native import IS_BUILT
from cyborg_torchrl.cores.kernels.selective_scan import selective_scan_cpp
from cyborg_torchrl.training.command import positive

Run = Callable[[], object]
WARM_UP = 3
"""Pairs that do not count: the process still requests memory from the system."""


def paired(first: Run, second: Run, repeats: int) -> tuple[float, float, float]:
    """Return both medians in milliseconds, and the median ratio first / second of neighbouring runs."""
    for run in (first, second) * WARM_UP:
        run()
    pairs = [(_milliseconds(first), _milliseconds(second)) for _ in range(repeats)]
    return median(a for a, _ in pairs), median(b for _, b in pairs), median(a / b for a, b in pairs)


def _milliseconds(run: Run) -> float:
    finish()  # wait for earlier work
    start = time.perf_counter()
    run()
    finish()
    return 1e3 * (time.perf_counter() - start)


def training(core: Core, x: Tensor) -> Run:
    """Build the forward and backward pass of a core over a sequence [B, T, F] without resets."""
    is_init = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    core.to(x.device)

    def run() -> None:
        y, _ = core(x, core.initial_state(x.shape[0]), is_init)
        y.sum().backward()

    return run


def torch_training(module: nn.GRU | nn.LSTM, x: Tensor) -> Run:
    """Build the forward and backward pass of one of torch's networks."""
    module.to(x.device)
    return lambda: module(x)[0].sum().backward()


def acting(core: Core, x: Tensor, steps: int = 50) -> Run:
    """Build acting steps of a core, each from the last state, after 128 other steps: a window of attention is full.

    The next run continues from the last state, as in acting.
    """
    core.to(x.device)
    before = x.unsqueeze(1).expand(-1, 128, -1)
    with torch.no_grad():
        is_init = torch.zeros(before.shape[:2], dtype=torch.bool, device=x.device)
        _, state = core(before, core.initial_state(x.shape[0]), is_init)

    @torch.no_grad()
    def run() -> None:
        nonlocal state
        for _ in range(steps):
            _, state = core.step(x, state)

    return run


def torch_acting(cell: nn.GRUCell, x: Tensor, steps: int = 50) -> Run:
    """Build acting steps of torch's cell."""
    cell.to(x.device)

    @torch.no_grad()
    def run() -> None:
        hidden = x.new_zeros(x.shape[0], cell.hidden_size)
        for _ in range(steps):
            hidden = cell(x, hidden)

    return run


def loop_scan(
    u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, h_0: Tensor
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute the selective scan by a loop under autograd; `unbind` instead of indexing keeps it linear in time."""
    outputs: list[Tensor] = []
    h_t = h_0
    rows = zip(u.unbind(1), delta.unbind(1), b.unbind(1), c.unbind(1), strict=True)
    for u_t, delta_t, b_t, c_t in rows:
        h_t = torch.exp(delta_t.unsqueeze(-1) * a) * h_t + (delta_t * u_t).unsqueeze(-1) * b_t.unsqueeze(1)
        outputs.append(torch.einsum("bdn,bn->bd", h_t, c_t))
    return torch.stack(outputs, 1), h_t


def scans(
    sizes: tuple[int, int, int, int],
    device: torch.device,
    scan: Callable[..., tuple[Tensor, Tensor]] = selective_scan,
) -> tuple[Run, Run]:
    """Build our selective scan and the loop; sizes are batch, time, channels and state."""
    batch, steps, channels, numbers = sizes
    u, delta = torch.randn(2, batch, steps, channels, device=device)
    delta = delta - 3
    b, c = torch.randn(2, batch, steps, numbers, device=device)
    a = -torch.rand(channels, numbers, device=device) - 0.1
    h_0 = torch.zeros(batch, channels, numbers, device=device)
    batch_first = [x.requires_grad_() for x in (u, delta.exp(), a, b, c, h_0)]
    time_first = [x.detach().transpose(0, 1).contiguous() for x in (u, delta.exp(), b, c)]
    time_first = [time_first[0], time_first[1], a.detach(), *time_first[2:], h_0.detach()]
    time_first = [x.clone().requires_grad_() for x in time_first]
    is_init = torch.zeros(steps, batch, dtype=torch.bool, device=device)

    def ours() -> None:
        u, delta, a, b, c, h_0 = time_first
        y, last = scan(u, delta, a, b, c, h_0, is_init, torch.zeros_like(h_0))
        (y.sum() + last.sum()).backward()

    def loop() -> None:
        u, delta, a, b, c, h_0 = batch_first
        y, last = loop_scan(u, delta, a, b, c, h_0)
        (y.sum() + last.sum()).backward()

    return ours, loop


def comparisons(device: torch.device) -> Iterator[tuple[str, str, str, Run, Run]]:
    """Return for each comparison the two names, the target on a CPU, and the two computations."""
    x = torch.randn(64, 128, 64, device=device)
    for name, core in {
        "mamba2 block, d_model 64": Mamba2Block(64),
        "mamba block, d_model 64": MambaBlock(64),
        "lru 128": build_lru(64, hidden_size=128),
        "gru 128": build_gru(64, hidden_size=128),
    }.items():
        bar = "<= 1" if name.startswith(("mamba2", "lru")) else ""
        yield (
            f"{name}, 64 x 128",
            "nn.GRU 128",
            bar,
            training(core, x),
            torch_training(nn.GRU(64, 128, batch_first=True), x),
        )
    yield (
        "lstm 128, 64 x 128", "nn.LSTM 128", "",
        training(build_lstm(64, hidden_size=128), x), torch_training(nn.LSTM(64, 128, batch_first=True), x),
    )  # fmt: skip
    wide = torch.randn(64, 128, 128, device=device)
    yield (
        "mamba block, d_model 128, 64 x 128", "nn.GRU 128", "<= 3",
        training(MambaBlock(128), wide), torch_training(nn.GRU(128, 128, batch_first=True), wide),
    )  # fmt: skip
    gru, cell = nn.GRU(64, 64, batch_first=True), nn.GRUCell(64, 64)
    for name, core, train_bar, act_bar in (
        ("attention, window 128", build_attention(64, window=128), "<= 3", "<= 6"),
        ("gated_delta", build_gated_delta(64), "<= 3", ""),
        ("min_gru", build_min_gru(64), "<= 1", ""),
        ("rnn", build_rnn(64), "<= 1", ""),
        ("ffm", build_ffm(64), "", ""),
        ("bistable", build_bistable(64), "", ""),
    ):
        yield f"{name}, 64 x 128", "nn.GRU 64", train_bar, training(core, x), torch_training(gru, x)
        yield (
            f"{name}, 50 acting steps of 64", "GRUCell 64", act_bar,
            acting(core, x[:, 0]), torch_acting(cell, x[:, 0]),
        )  # fmt: skip
    sizes = 64, 128, 128, 16
    yield "selective scan, 64 x 128 x 128 x 16", "loop with unbind", "<= 0.5", *scans(sizes, device)
    if IS_BUILT and device.type == "cpu":
        in_torch, _ = scans(sizes, device)
        in_cpp, _ = scans(sizes, device, selective_scan_cpp)
        yield "selective scan in C++, 64 x 128 x 128 x 16", "ours in torch", "<= 0.33", in_cpp, in_torch
    yield "selective scan, 8 x 1002 x 128 x 16", "loop with unbind", "", *scans((8, 1002, 128, 16), device)
    for kind in (MambaBlock, Mamba2Block) if device.type == "cuda" else ():
        ours = kind(64, kernel="torch")
        official = kind(64, kernel="cuda")
        try:
            official.kernel.choose(device, torch.float32)
        except RuntimeError as error:
            print(f"mamba-ssm's kernels are left out: {error}", file=sys.stderr)
            break
        name = f"{kind.__name__} on mamba-ssm's kernel"
        for rows, steps in ((64, 128), (64, 1002), (8, 8192)):
            long = torch.randn(rows, steps, 64, device=device)
            yield f"{name}, {rows} x {steps}", "our torch path", "", training(official, long), training(ours, long)
    for name, core in {
        "mamba2 block": Mamba2Block(64),
        "mamba block": MambaBlock(64),
        "lru 128": build_lru(64, hidden_size=128),
        "gru 128": build_gru(64, hidden_size=128),
    }.items():
        bar = "<= 4" if name == "mamba2 block" else ""
        yield (
            f"{name}, 50 acting steps of 64",
            "GRUCell 128",
            bar,
            acting(core, x[:, 0]),
            torch_acting(nn.GRUCell(64, 128), x[:, 0]),
        )


def lengths(
    only: str, repeats: int, device: torch.device, long: int = 8192
) -> Iterator[tuple[str, float, float, float]]:
    """Return the milliseconds of a step in a long and a short sequence, and their ratio: 1 if the cost is linear."""
    for name, core, short in (
        ("mamba2 block, d_model 64", Mamba2Block(64), 128),
        ("mamba block, d_model 64", MambaBlock(64), 128),
        ("lru 128", build_lru(64, hidden_size=128), 128),
        ("gru 128", build_gru(64, hidden_size=128), 128),
        ("attention, window 128", build_attention(64, window=128), 512),
    ):
        if only not in name:
            continue
        runs = [training(core, torch.randn(32, steps, 64, device=device)) for steps in (long, short)]
        a, b, ratio = paired(
            runs[0], lambda run=runs[1], times=long // short: [run() for _ in range(times)], max(3, repeats // 5)
        )
        yield f"{name}, against {short} steps", a / long, b / long, ratio


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables. Return 0, or 2 if there is nothing to time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=positive, default=15, help="pairs of runs a line (%(default)s)")
    parser.add_argument("--only", default="", help="lines whose name has this in it (all)")
    parser.add_argument("--threads", type=positive, default=1, help="threads of torch (%(default)s)")
    parser.add_argument("--device", type=device_here, default="cpu", help="cpu, cuda or cuda:N (%(default)s)")
    arguments = parser.parse_args(argv)
    prepare_cpu(arguments.threads)
    torch.manual_seed(0)
    console = Console(width=140)
    table = Table(
        "ours",
        "against",
        title=f"forward and backward, {device_name(arguments.device)}, {arguments.threads} thread(s), "
        f"medians of {arguments.repeats}",
    )
    for column in ("ms", "ms against", "ratio", "bar"):
        table.add_column(column, justify="right")
    for name, against, bar, first, second in comparisons(arguments.device):
        if arguments.only not in name:
            continue
        a, b, ratio = paired(first, second, arguments.repeats)
        table.add_row(name, against, f"{a:.2f}", f"{b:.2f}", f"{ratio:.2f}", bar)
        print(f"timed: {name}: {a:.2f} ms, {against} {b:.2f} ms, {ratio:.2f}", file=sys.stderr)  # saved at each row
    if not table.row_count:
        print(f"error: no line's name has '{arguments.only}' in it; try lru, gru, mamba or scan", file=sys.stderr)
        return 2
    console.print(table)
    linear = Table("core, 32 environments", title="cost of a step: long and short sequences")
    for column in ("ms at 8192", "ms in short ones", "ratio", "bar"):
        linear.add_column(column, justify="right")
    for name, a, b, ratio in lengths(arguments.only, arguments.repeats, arguments.device):
        linear.add_row(name, f"{a:.4f}", f"{b:.4f}", f"{ratio:.2f}", "<= 1.2")
    if linear.row_count:
        console.print(linear)
    return 0


if __name__ == "__main__":
    sys.exit(main())
