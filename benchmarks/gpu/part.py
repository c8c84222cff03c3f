"""One part of the benchmark in a process. Each line of stdout is a row, as JSON.

python -m benchmarks.gpu.part sequences --device cuda
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from benchmarks.device import device_here
from benchmarks.gpu import gpu_tests, kernels, minibatch, runs, sequences
from benchmarks.gpu.timing import Row
from cyborg_torchrl.collectors.runtime import prepare_cpu


class Part(NamedTuple):
    """A part of the benchmark."""

    rows: Callable[[torch.device, bool], Iterator[Row]]
    """Yields results, given the device and whether the sizes are tiny."""
    seconds: int
    """Share of the nine minutes."""


PARTS = {
    "tests": Part(gpu_tests.gpu_tests, 90),
    "exact": Part(runs.exact, 50),
    "sequences": Part(sequences.sequences, 80),
    "large": Part(sequences.large, 55),
    "cores": Part(sequences.cores, 60),
    "default_runs": Part(runs.default_runs, 65),
    "many_environments": Part(runs.many_environments, 25),
    "mission": Part(runs.mission, 25),
    "minibatch": Part(minibatch.minibatches, 35),
    "kernels": Part(kernels.kernels, 45),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a part. Anything else that is printed goes to stderr."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--device", type=device_here, required=True)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes")
    arguments = parser.parse_args(argv)
    prepare_cpu(1)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # libraries in C++ print, too
    for row in PARTS[arguments.part].rows(arguments.device, arguments.smoke):
        print(json.dumps(row), file=answers, flush=True)


if __name__ == "__main__":
    main()
