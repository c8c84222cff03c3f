"""Check every library in its own environment, and write the table of docs/honesty.md.

python -m benchmarks.honesty                      # all libraries: makes missing environments first
python -m benchmarks.honesty skrl rsl_rl          # some of them; the others keep their last results
python -m benchmarks.honesty --table-only         # print the table of the last results
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results"
LIBRARIES = {
    "ours": "this package, gru",
    "torchrl": "TorchRL, GRUModule",
    "torchrl_lstm": "TorchRL, LSTMModule",
    "torchrl_transformer": "TorchRL, TransformerModule",
    "sb3_contrib": "sb3-contrib, RecurrentPPO",
    "cleanrl": "CleanRL, LSTM pattern",
    "skrl": "skrl, PPO_RNN",
    "rsl_rl": "rsl_rl, RNNModel",
    "tianshou": "tianshou, Recurrent",
    "rllib": "RLlib, LSTM module",
    "pfrl": "PFRL, recurrent PPO",
    "pfrl_dqn": "PFRL, recurrent DoubleDQN",
    "pufferlib": "PufferLib, LSTMWrapper",
    "agilerl": "AgileRL, RecurrentPPO",
    "sample_factory": "Sample Factory, GRU",
    "openrl": "OpenRL, PPOAgent",
}
COLUMNS = {
    "same state": ("rollout", "same state: single steps"),
    "in sequence": ("rollout", "same state: whole rows"),
    "order": ("rollout", "states follow one another"),
    "bootstrap": ("rollout", "bootstrapped values"),
    "padding": ("rollout", "padding"),
    "both modes": ("policy", "step against sequence"),
    "reset leak": ("policy", "reset leak: sequence mode"),
    "reset timing": ("policy", "reset timing: sequence mode"),
    "environments": ("policy", "environments alone and together"),
    "partial reset": ("policy", "partial reset: step mode"),
    "horizon": ("policy", "gradient horizon"),
    "gradients": ("policy", "gradient: sequence against steps"),
    "new parameters": ("policy", "state after a parameter change"),
    "evaluation": ("policy", "evaluation in between"),
    "stale states": ("policy", "drift: |dh| / |h|"),
}
"""The columns of the table: a report, and the finding in it."""


def main() -> int:
    """Run the adapters and print the table. Return 1 if one could not be run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("libraries", nargs="*", choices=[[], *LIBRARIES], help="which to run (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table-only", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    missing = []
    if not arguments.table_only:
        RESULTS.mkdir(exist_ok=True)
        missing = [name for name in arguments.libraries or LIBRARIES if not run(name, arguments.seed)]
    print(table())
    if missing:
        print(f"could not be run: {', '.join(missing)}")
    return int(bool(missing))


def run(library: str, seed: int) -> bool:
    """Check a library in its environment, which is made if it is missing. Return whether it could be run."""
    python = ROOT / ".venv" / "bin" / "python"
    if (HERE / library / "requirements.txt").exists():
        python = ROOT / ".venv-honesty" / library / "bin" / "python"
        if not python.exists() and subprocess.run([HERE / "make_env", library], check=False).returncode:
            return False
    command = [python, "-m", "benchmarks.honesty.one", library, "--seed", str(seed)]
    output = RESULTS / f"{library}.json"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return not subprocess.run([*command, "--output", output], cwd=ROOT, env=environment, check=False).returncode


def table() -> str:
    """Return the results as a Markdown table: a figure where a check passed, and the verdict where it did not."""
    lines = [f"| library | version | date | {' | '.join(COLUMNS)} |", f"|{'---|' * (len(COLUMNS) + 3)}"]
    for name, title in LIBRARIES.items():
        path = RESULTS / f"{name}.json"
        if path.exists():
            entry = json.loads(path.read_text())
            cells = [_cell(entry["reports"], *column) for column in COLUMNS.values()]
            lines.append(f"| {title} | {entry['version']} | {entry['date']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(reports: dict[str, Any], report: str, name: str) -> str:
    findings = (reports[report] or {"findings": []})["findings"]
    finding = next((each for each in findings if each["name"] == name), None)
    if finding is None:
        return "n/a"
    value = finding["value"]
    figure = "" if value is None else f"{value:.1g}" if abs(value) < 1 else f"{value:g}"
    marks = {"failed": "**failed** ", "consequence": "follows ", "not_applicable": "n/a "}
    return f"{marks.get(finding['verdict'], '')}{figure}".strip()


if __name__ == "__main__":
    sys.exit(main())
