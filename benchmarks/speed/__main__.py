"""Measure the speed of collection and training, ours and others', in one run on one thread.

python -m benchmarks.speed --output speed.json --plot speed.png
python -m benchmarks.speed --parts collection update --device cuda

collection: FusedCollector, TorchRL's Collector and a raw PyTorch loop, with the same networks and the same task.
processes: RolloutCollector and TorchRL's Collector on 16 Crafter worlds in two processes.
update: repeated updates from one rollout. end_to_end: collection and update, compared with other libraries that use
the same steps, epochs and minibatches. truncated: the same for PufferLib, with one epoch of 64-step BPTT. horizons: our
time per step and memory per stored step, from 40 steps to 10,000.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.device import device_here, machine
from benchmarks.speed.baselines import BASELINES, MissingPackage, pufferlib
from benchmarks.speed.measure import Subject, rows_of, take_turns
from benchmarks.speed.plot import draw
from benchmarks.speed.subjects import Case, collection, in_processes, training, updating
from cyborg_torchrl.collectors.runtime import prepare_cpu
from cyborg_torchrl.training.command import picture, positive, writable

PARTS = ("collection", "processes", "update", "end_to_end", "truncated", "horizons")
PACKAGES = ("torch", "torchrl", "tensordict", "sb3-contrib", "numpy")
SHORT = 64
"""Steps of a sequence in truncated BPTT, the default of PufferLib."""
ON_ANY_DEVICE = ("collection", "update")
Row = dict[str, Any]


def comparisons(arguments: argparse.Namespace) -> list[tuple[Row, Callable[[], list[Subject]]]]:
    """The comparisons: the entries of each row, and the builder of its subjects."""
    found: list[tuple[Row, Callable[[], list[Subject]]]] = []

    def add(part: str, case: Case, build: Callable[[], list[Subject]]) -> None:
        about = {key: value for key, value in case._asdict().items() if key != "n_steps"}
        found.append(({"part": part, **about, "steps": case.steps}, build))

    for count in arguments.num_envs if "collection" in arguments.parts else []:
        for backbone in arguments.backbones:
            where = str(arguments.device)
            case = Case(backbone, count, arguments.horizon, arguments.width, n_steps=arguments.collected, device=where)
            add("collection", case, lambda case=case: collection(case))
    if "processes" in arguments.parts:
        case = Case(arguments.backbones[0], 16, 0, arguments.width, n_steps=min(64, arguments.collected))
        add("processes", case, lambda case=case: in_processes(case))
    for backbone in arguments.backbones if "update" in arguments.parts else []:
        case = Case(backbone, 64, arguments.horizon, arguments.width, device=str(arguments.device))
        add("update", case, lambda case=case: [updating(case)])
    if "end_to_end" in arguments.parts:
        for horizon in dict.fromkeys((40, arguments.horizon)):
            cases = [Case(backbone, 64, horizon, arguments.width) for backbone in arguments.backbones]
            add("end_to_end", cases[0], lambda cases=cases: _beside_others(cases, arguments.beside))
    if "truncated" in arguments.parts:
        short = Case("", 64, 16 * SHORT - 2, arguments.width, n_steps=16 * SHORT, n_epochs=1, seq_len=SHORT)
        cases = [short._replace(backbone=name) for name in arguments.backbones]
        add("truncated", cases[0], lambda cases=cases: _beside_pufferlib(cases, arguments.pufferlib_python))
    for horizon in arguments.horizons if "horizons" in arguments.parts else []:
        case = Case(arguments.backbones[0], 64, horizon, arguments.width)
        add("horizons", case, lambda case=case: [training(case)])
    return found


def _beside_others(cases: list[Case], beside: Sequence[str]) -> list[Subject]:
    subjects = [training(case, f"ours, {case.backbone}") for case in cases]
    for name in beside:
        try:
            subjects.append(BASELINES[name](cases[0]))
        except MissingPackage as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
    return subjects


def _beside_pufferlib(cases: list[Case], python: str | None) -> list[Subject]:
    subjects = [training(case, f"ours, {case.backbone}") for case in cases]
    try:
        subjects.append(pufferlib(cases[0], python))
    except MissingPackage as error:
        print(f"PufferLib is left out: {error}", file=sys.stderr)
    return subjects


def memory_of(case: Case) -> float:
    """Return the peak memory in MiB of another process that trains on one rollout."""
    code = (
        "from cyborg_torchrl.training.experiment import peak_rss_mb; "
        "from cyborg_torchrl.collectors.runtime import prepare_cpu; "
        "from benchmarks.speed.subjects import Case, training; "
        f"prepare_cpu(1); training(Case(*{tuple(case)!r}))[1](); print(peak_rss_mb())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout.strip().splitlines()[-1])


def table_of(rows: list[Row]) -> Table:
    """Return the rows as a table."""
    table = Table(title="in turns in one process; ratios are medians over neighbouring runs")
    for name in ("part", "subject", "backbone", "envs", "horizon", "steps/s", "µs/step", "cpu µs/step", "first is x"):
        table.add_column(name, justify="left" if name in ("part", "subject", "backbone") else "right")
    for row in rows:
        table.add_row(
            row["part"], row["subject"], row["backbone"], f"{row['num_envs']:,}", f"{row['horizon']:,}",
            f"{row['steps_per_second']:,.0f}", f"{row['wall_us_per_step']:.2f}", f"{row['cpu_us_per_step']:.2f}",
            f"{row['first_is_times_as_fast']:.2f}",
        )  # fmt: skip
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table and write it. Return the exit status."""
    parser = argparse.ArgumentParser(
        prog="speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--backbones", nargs="+", default=["lru", "lstm"])
    parser.add_argument("--num-envs", nargs="+", type=positive, default=[16, 64, 256, 1024], help="of collection")
    parser.add_argument("--horizon", type=positive, default=1000)
    parser.add_argument("--horizons", nargs="+", type=positive, default=[40, 100, 1000, 10_000])
    parser.add_argument("--collected", type=positive, default=256, help="steps of a rollout where only that is timed")
    parser.add_argument("--width", type=positive, default=128)
    parser.add_argument("--beside", nargs="*", choices=list(BASELINES), default=list(BASELINES))
    parser.add_argument(
        "--pufferlib-python", help="interpreter of an environment that has PufferLib, whose packages exclude ours"
    )
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument(
        "--device", type=device_here, default="cpu", help="of collection and update: cpu, cuda or cuda:N (%(default)s)"
    )
    parser.add_argument("--output", type=writable, help="JSON file for all figures")
    parser.add_argument("--plot", type=picture, help="picture of the comparisons")
    arguments = parser.parse_args(argv)
    prepare_cpu(arguments.threads)
    if arguments.device.type != "cpu" and (others := set(arguments.parts) - set(ON_ANY_DEVICE)):
        named = ", ".join(sorted(others))
        parser.error(f"--device {arguments.device} is for --parts {' '.join(ON_ANY_DEVICE)}; {named} run on the CPU")
    rows: list[Row] = []
    todo = comparisons(arguments)
    with Progress(transient=True) as progress:
        bar = progress.add_task("measuring", total=len(todo))
        for about, build in todo:
            timings = take_turns(build(), arguments.repeats)
            found = rows_of(timings, about)
            if about["part"] == "horizons":
                case = Case(about["backbone"], about["num_envs"], about["horizon"], about["width"])
                found[0]["peak_memory_mb"] = memory_of(case)
            rows += found
            progress.advance(bar)
            if arguments.output:  # keep finished rows if the program is stopped
                _write(arguments.output, rows)
    Console(width=160).print(table_of(rows))
    if arguments.plot:
        draw(rows, arguments.plot)
    return 0


def _write(path: Path, rows: list[Row]) -> None:
    path.write_text(json.dumps({"machine": machine(PACKAGES), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
