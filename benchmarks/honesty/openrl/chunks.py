"""Print how far the first minibatch of OpenRL is from acting.

    .venv-honesty/openrl/bin/python -m benchmarks.honesty.openrl.chunks 25

The argument is the length of a rollout. OpenRL cuts its steps into chunks of two, over the ends of environments.
"""

from __future__ import annotations

import sys
from itertools import count

import gymnasium
from openrl.algorithms.ppo import PPOAlgorithm
from openrl.configs.config import create_config_parser
from openrl.envs.common import make
from openrl.modules.common import PPONet
from openrl.runners.common import PPOAgent
from torch import Tensor

from benchmarks.honesty.common import NUM_ENVS, WIDTH, NoiseEnv

STEPS = int(sys.argv[1])
OPTIONS = {"seed": 0, "use_recurrent_policy": True, "hidden_size": WIDTH, "episode_length": STEPS}
OPTIONS |= {"ppo_epoch": 1, "num_mini_batch": 1}


class RatioPrinted(PPOAlgorithm):
    """Prints the largest |log ratio| of the minibatch."""

    def prepare_loss(self, *args: object) -> tuple[object, ...]:
        """Return the losses, and the ratio as the last entry."""
        *losses, ratio = super().prepare_loss(*args)
        assert isinstance(ratio, Tensor)
        print(f"{STEPS} steps: |log ratio| {ratio.log().abs().max():.1e}")
        return *losses, ratio


seeds = count()
gymnasium.register("Noise-v0", lambda **_: NoiseEnv(next(seeds)))
network = PPONet(make("Noise-v0", env_num=NUM_ENVS), create_config_parser().parse_object(OPTIONS))
PPOAgent(network).train(NUM_ENVS * STEPS, train_algo_class=RatioPrinted)
