"""Check one library in its own environment: python -m benchmarks.honesty.one skrl --seed 0 --output skrl.json."""

from __future__ import annotations

import argparse
import importlib
import json
import time
import warnings
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console


def main() -> None:
    """Run the adapter of a library and write its findings."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", help="a folder of benchmarks/honesty")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="write the findings as JSON")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    adapter = importlib.import_module(f"benchmarks.honesty.{arguments.library}.adapter")
    started = time.process_time()
    reports = dict(zip(("policy", "rollout"), adapter.check(arguments.seed), strict=True))
    seconds = round(time.process_time() - started, 1)
    console = Console(width=160)
    for report in reports.values():
        if report is not None:
            console.print(report.table())
    print(f"{arguments.library}: {seconds} s of CPU")
    if arguments.output:
        entry = {
            "package": adapter.PACKAGE,
            "version": getattr(adapter, "VERSION", None) or version(adapter.PACKAGE),
            "date": datetime.now(UTC).date().isoformat(),
            "seed": arguments.seed,
            "cpu_seconds": seconds,
            "reports": {name: report and report.to_dict() for name, report in reports.items()},
        }
        arguments.output.write_text(json.dumps(entry, indent=1) + "\n")


if __name__ == "__main__":
    main()
