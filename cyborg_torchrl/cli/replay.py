"""Look into the dump of a run that stopped at NaN.

    cyborg-torchrl replay runs/my-run/dumps/update_00000012.pt

Prints the steps around the first number that was not finite, and whether the agent computes it again.
The last line of stdout is one JSON object.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from cyborg_torchrl import keys
from cyborg_torchrl.training.checkpoint import DUMP, CheckpointError, load_checkpoint
from cyborg_torchrl.training.command import CommandParser
from cyborg_torchrl.training.loading import agent_from_content

AROUND = 3
"""Steps that are shown before and after the one that was not finite."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the dump. Return the exit code."""
    parser = CommandParser(prog="cyborg-torchrl replay", description=__doc__)
    parser.add_argument("dump", type=Path, help="a file in a run's 'dumps'")
    path: Path = parser.parse(argv).dump
    if not path.is_file():
        raise CheckpointError(f"no dump '{path}': name a file, such as one in a run's 'dumps'.")
    content = load_checkpoint(path, kind=DUMP)
    agent = agent_from_content(content, path, ["train.device=cpu"]).agent
    print(f"update {content['update']}: {content['message']}")
    steps = content.get("steps")
    if not steps:
        print("the steps before it are not known")
        print(json.dumps({"key": content["key"], "is_reproduced": None}))
        return 0
    row = TensorDict(steps, [len(steps[keys.ACTION])])
    again = _log_probs(agent, row)
    _print_steps(row, again, content["step"])
    broken = (~again.isfinite()).nonzero()
    first = int(broken[0]) if len(broken) else None
    known = {key: content[key] for key in ("key", "environment", "step", "update")}
    print(json.dumps({**known, "is_reproduced": first is not None, "first_step_without_log_prob": first}))
    return 0


@torch.no_grad()
def _log_probs(agent, row: TensorDictBase) -> Tensor:
    """Return log-probs [T] of the steps by the dump's agent, from the initial state on."""
    observed = row.select(*agent.observed_keys).unsqueeze(0)
    is_init = row.get(keys.IS_INIT).reshape(1, -1)
    obs = observed if len(agent.observed_keys) > 1 else observed.get(agent.observed_keys[0])
    actions = row.get(keys.ACTION).unsqueeze(0)
    try:
        return agent.evaluate_actions(obs, actions, is_init=is_init).log_prob[0]
    except ValueError:  # torch's distributions refuse NaN
        return torch.full([len(row)], torch.nan)


def _print_steps(row: TensorDictBase, again: Tensor, step: int | None) -> None:
    shown = range(len(row)) if step is None else range(max(0, step - AROUND), min(len(row), step + AROUND + 1))
    for t in shown:
        parts = [f"step {t}{'  <--' if t == step else ''}"]
        for key in row.keys(True, True):
            value = row.get(key)[t]
            if value.is_floating_point():
                name = "/".join(key) if isinstance(key, tuple) else key
                low, high = value.min().item(), value.max().item()
                parts.append(f"{name} {low:.4g}" if value.numel() == 1 else f"{name} {low:.4g} to {high:.4g}")
        parts.append(f"log-prob again {again[t].item():.4g}")
        print("  ".join(parts))
