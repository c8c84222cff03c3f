"""POPGym's pendulums: swing up a pendulum of which only the position is seen."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchrl.data import Bounded

from cyborg_torchrl.envs.popgym.base import Entries, Outcome, PopgymEnv, Spaces

MAX_SPEED, MAX_TORQUE, TIME_STEP = 8.0, 2.0, 0.05
"""In radians/s, N m and s."""
HALF_COST = 16.2736044 / 2
"""Half of the highest cost of a step."""


class PositionOnlyPendulumEnv(PopgymEnv):
    """PositionOnlyPendulum: gymnasium's Pendulum without the velocity.

    - Observation, [N, 2] float: cosine and sine of the angle, which is 0 at the top.
    - Action, [N, 1] float in [-2, 2]: torque in N m; other values are clipped.
    - Reward: gymnasium's, shifted and scaled to [-1 / steps, 1 / steps].
    - The episode is truncated after its steps.

    | level | steps |
    |---|---|
    | Easy | 200 |
    | Medium | 150 |
    | Hard | 100 |

    The first angle is drawn evenly from all, the first velocity from [-1, 1]. States are float64, as in gymnasium.
    """

    levels = {"Easy": {"steps": 200}, "Medium": {"steps": 150}, "Hard": {"steps": 100}}
    steps: int

    def spaces(self) -> Spaces:
        """Return the specs and the length that follow from the level."""
        observation = Bounded(-1.0, 1.0, shape=(2,), dtype=torch.float32)
        return Spaces(observation, Bounded(-MAX_TORQUE, MAX_TORQUE, shape=(1,), dtype=torch.float32), self.steps)

    def _prepare_tables(self) -> None:
        self._best = torch.tensor(1 / self.steps, dtype=torch.float64, device=self.device)

    def _draw(self, count: int) -> Entries:
        unit = torch.rand(count, 2, dtype=torch.float64, generator=self._generator, device=self.device) * 2 - 1
        return {"state": unit * torch.tensor([math.pi, 1.0], dtype=torch.float64, device=self.device)}

    def _prepare(self, drawn: Entries) -> Entries:
        angle, speed = drawn["state"].split(1, 1)
        return {"angle": angle, "speed": speed, "observation": _position(angle)}

    def _play(self, action: Tensor, entries: Entries) -> Outcome:
        angle, speed = entries["angle"], entries["speed"]
        torque = action.clamp(-MAX_TORQUE, MAX_TORQUE)
        lean = (angle + math.pi).remainder(2 * math.pi) - math.pi
        cost = torch.addcmul(lean * lean, speed, speed, value=0.1)
        cost = torch.addcmul(cost, torque, torque, value=0.001)
        reward = torch.add(self._best, cost, alpha=-1 / (HALF_COST * self.steps)).float()
        # Gravity 10 m/s², mass 1 kg, length 1 m. gymnasium multiplies the torque in float32, and then adds in float64.
        acceleration = torch.add(torque * 3.0, angle.sin(), alpha=15.0)
        speed = torch.add(speed, acceleration, alpha=TIME_STEP).clamp(-MAX_SPEED, MAX_SPEED)
        angle = torch.add(angle, speed, alpha=TIME_STEP)
        entries.update(angle=angle, speed=speed, observation=self._seen_of(_position(angle)))
        return Outcome(reward, None)

    def _seen_of(self, position: Tensor) -> Tensor:
        """Return the observations [N, 2] in a step, from the positions [N, 2]."""
        return position


class NoisyPositionOnlyPendulumEnv(PositionOnlyPendulumEnv):
    """NoisyPositionOnlyPendulum: gymnasium's Pendulum without the velocity, and with a noisy position.

    Normal noise is added to cosine and sine, and they are clipped to [-1, 1]. Everything else is as in
    `PositionOnlyPendulumEnv`.

    | level | steps | deviation of the noise |
    |---|---|---|
    | Easy | 200 | 0.1 |
    | Medium | 200 | 0.2 |
    | Hard | 200 | 0.3 |
    """

    levels = {
        "Easy": {"steps": 200, "deviation": 0.1},
        "Medium": {"steps": 200, "deviation": 0.2},
        "Hard": {"steps": 200, "deviation": 0.3},
    }
    deviation: float

    def _draw(self, count: int) -> Entries:
        noise = torch.randn(count, 2, generator=self._generator, device=self.device)
        return {**super()._draw(count), "noise": noise}

    def _prepare(self, drawn: Entries) -> Entries:
        entries = super()._prepare(drawn)
        return {**entries, "observation": self._noisy(entries["observation"], drawn["noise"])}

    def _seen_of(self, position: Tensor) -> Tensor:
        return self._noisy(position, self._random(torch.randn, 2))

    def _noisy(self, position: Tensor, noise: Tensor) -> Tensor:
        return torch.add(position, noise, alpha=self.deviation).clamp(-1.0, 1.0)


def _position(angle: Tensor) -> Tensor:
    """Return cosine and sine, [N, 2] float, of angles [N, 1]."""
    return torch.cat((angle.cos(), angle.sin()), 1).float()
