"""Train a robot that sees a picture and its position, but not its velocity.

python examples/point_mass.py                                  # examples/robot.yaml
python examples/point_mass.py train.recurrent_mode=none train.seq_len=null     # the control without memory

The last line of stdout is the summary as one JSON object. A run imports this module by the id of its environment,
`point_mass:PointMass-v0`: `PYTHONPATH=examples cyborg-torchrl evaluate runs/...`.
"""

import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from cyborg_torchrl.training.command import main

SIDE, STEPS = 32, 60
GAIN, DRAG = 0.04, 0.02


class PointMass(gymnasium.Env):
    """A mass on a square floor, [-1, 1] x [-1, 1], has to come to rest on a target.

    The camera above shows the target, a red square. The body knows its position. The velocity is hidden, and has to be
    remembered. Each thruster is stronger in one direction. The reward is 1 on the target and 0 at a distance of 1.
    """

    def __init__(self) -> None:
        self.observation_space = spaces.Dict(
            camera=spaces.Box(0, 255, (SIDE, SIDE, 3), np.uint8), position=spaces.Box(-1.0, 1.0, (2,), np.float32)
        )
        self.action_space = spaces.Box(np.array([-0.5, -1.0], np.float32), np.array([1.0, 0.5], np.float32))
        self.position, self.velocity, self.target = np.zeros((3, 2))

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict[str, np.ndarray], dict]:
        """Put mass and target at random places."""
        super().reset(seed=seed)
        self.position, self.target = self.np_random.uniform(-0.9, 0.9, (2, 2))
        self.velocity = self.np_random.uniform(-0.05, 0.05, 2)
        return self._observe(), {}

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Accelerate, move, and stop at the walls."""
        self.velocity = (1 - DRAG) * self.velocity + GAIN * np.asarray(action)
        moved = self.position + self.velocity
        self.position = moved.clip(-1.0, 1.0)
        self.velocity[moved != self.position] = 0.0
        reward = max(0.0, 1.0 - float(np.linalg.norm(self.position - self.target)))
        return self._observe(), reward, False, False, {}

    def _observe(self) -> dict[str, np.ndarray]:
        picture = np.zeros((SIDE, SIDE, 3), np.uint8)
        column, row = ((self.target + 1) / 2 * (SIDE - 3)).round().astype(int)
        picture[row : row + 3, column : column + 3, 0] = 255
        return {"camera": picture, "position": self.position.astype(np.float32)}


if __name__ == "__main__":
    sys.exit(main(description=__doc__, default_config=str(Path(__file__).with_name("robot.yaml"))))
gymnasium.register("PointMass-v0", PointMass, max_episode_steps=STEPS)
