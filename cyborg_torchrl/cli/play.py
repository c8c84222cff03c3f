"""Show some episodes of a trained agent, as a film or step by step as text.

    cyborg-torchrl play runs/my-run                                  # text
    cyborg-torchrl play runs/my-run --episodes 3 --output play.gif   # or play.mp4

Films show pixel observations, or the pictures that MiniGrid and gymnasium render. The text counts steps that
repeat the observation and bring no reward, and does not write them out.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial

from omegaconf import DictConfig, OmegaConf

from cyborg_torchrl.cli.arguments import agent_of, checkpoint_parser
from cyborg_torchrl.cli.playback import FILMS, Film, Frame, play, trace
from cyborg_torchrl.registry import environments
from cyborg_torchrl.training.command import CommandParser, UsageError, positive, writable
from cyborg_torchrl.training.evaluation import longest_episode
from cyborg_torchrl.training.loading import build_acting_env
from cyborg_torchrl.training.progress import progress_bar
from cyborg_torchrl.training.run_evaluation import EVALUATION_SEED_OFFSET

RENDERED = ("gymnasium", "minigrid")
"""Environments that can render where their observations have no pixels."""

MAX_STEPS = 1000
"""Steps after which an episode is cut, in films and in environments that do not know their longest episode."""


def _parser() -> CommandParser:
    parser = checkpoint_parser("play", __doc__)
    parser.add_argument("--episodes", type=positive, default=3, help="how many (%(default)s)")
    parser.add_argument(
        "--output", type=partial(writable, endings=FILMS), metavar="FILE", help="a film, .gif or .mp4; without: text"
    )
    parser.add_argument(
        "--max-steps",
        type=positive,
        help=f"episodes are cut after these ({MAX_STEPS}; as text the environment's limit, if it knows one)",
    )
    parser.add_argument("--sampled", action="store_true", help="draw actions as while training, not the likeliest")
    parser.add_argument("--fps", type=positive, default=10, help="pictures a second (%(default)s)")
    parser.add_argument("--size", type=positive, default=320, help="longer side of the picture, at most (%(default)s)")
    parser.add_argument("--full", action="store_true", help="text: every step")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Play and write. Return the exit code."""
    arguments = _parser().parse(argv)
    cfg, agent = agent_of(arguments)
    if arguments.output:
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame draws without a screen, and complains of none
        cfg = _rendered(cfg)
    seed = cfg.train.seed + EVALUATION_SEED_OFFSET
    with closing(build_acting_env(cfg, agent, num_envs=1, seed=seed, workers=0)) as env:
        known_limit = None if arguments.output else longest_episode(env)
        max_steps = arguments.max_steps or known_limit or MAX_STEPS
        frames = play(agent, env, arguments.episodes, is_deterministic=not arguments.sampled, max_steps=max_steps)
        cuts: list[Frame] = []
        frames = _with_cuts_noted(frames, cuts)
        if arguments.output:
            _write_film(arguments, cfg, frames)
        else:
            for line in trace(frames, is_full=arguments.full):
                print(line)
    if cuts:
        note = f"{len(cuts)} of {arguments.episodes} episodes did not end within {max_steps:,} steps and were cut"
        print(f"warning: {note}", file=sys.stderr)
    return 0


def _with_cuts_noted(frames: Iterable[Frame], cuts: list[Frame]) -> Iterator[Frame]:
    """Yield frames, and append the last one of each episode that was cut to a list."""
    for frame in frames:
        if frame.end == "cut" and not frame.action:
            cuts.append(frame)
        yield frame


def _write_film(arguments: argparse.Namespace, cfg: DictConfig, frames: Iterable[Frame]) -> None:
    film = Film(arguments.output, size=arguments.size, fps=arguments.fps)
    with progress_bar("episodes", arguments.episodes) as show:
        for frame in frames:
            if frame.picture is None:
                title = environments.title(cfg.env.name, cfg.env)
                raise UsageError(f"'{title}' shows no pictures: leave --output out, for the steps as text.")
            film.add(frame)
            show(frame.episode - bool(frame.action))
    film.close()
    print(f"{arguments.output}: {arguments.output.stat().st_size:,} bytes")


def _rendered(cfg: DictConfig) -> DictConfig:
    """Return a configuration whose environment renders pictures, if it can."""
    if cfg.env.name in RENDERED and not cfg.env.get("rgb"):
        OmegaConf.update(cfg, "env.options", {**(cfg.env.options or {}), "render_mode": "rgb_array"}, force_add=True)
    return cfg
