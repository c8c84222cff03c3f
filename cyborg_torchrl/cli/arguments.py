"""The arguments of commands that load an agent: a checkpoint, and changes to its configuration."""

from __future__ import annotations

import argparse

import torch
from omegaconf import DictConfig

from cyborg_torchrl.modules import PPOAgent
from cyborg_torchrl.training.builders import prepare_process
from cyborg_torchrl.training.command import CommandParser
from cyborg_torchrl.training.loading import load_agent


def checkpoint_parser(command: str, description: str | None) -> CommandParser:
    """Return a parser for a checkpoint, overrides and --seed, which `agent_of` reads."""
    parser = CommandParser(prog=f"cyborg-torchrl {command}", description=description)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a run's folder, or a file in its 'checkpoints'")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="changes, as in env.horizon=2000")
    parser.add_argument("--seed", type=int, help="seed of episodes and samples (the run's)")
    return parser


def agent_of(arguments: argparse.Namespace, *more_overrides: str) -> tuple[DictConfig, PPOAgent]:
    """Load the agent and its configuration, and prepare this process: its threads, and torch's seed."""
    seed = [] if arguments.seed is None else [f"train.seed={arguments.seed}"]
    cfg, agent, _ = load_agent(arguments.checkpoint, [*arguments.overrides, *seed, *more_overrides])
    prepare_process(cfg)
    torch.manual_seed(cfg.train.seed)
    return cfg, agent
