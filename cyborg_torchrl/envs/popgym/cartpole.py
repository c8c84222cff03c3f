"""POPGym's cart-poles: balance a pole of which only positions, noisy positions or velocities are seen."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchrl.data import Bounded, Categorical, Unbounded

from cyborg_torchrl.envs.popgym.base import Entries, Outcome, PopgymEnv, Spaces

GRAVITY, FORCE, TIME_STEP = 9.8, 10.0, 0.02
"""In m/s², N and s."""
CART_MASS, POLE_MASS, HALF_LENGTH = 1.0, 0.1, 0.5
"""In kg, kg and m."""
MASS, POLE_MOMENT = CART_MASS + POLE_MASS, POLE_MASS * HALF_LENGTH
MAX_POSITION, MAX_ANGLE = 2.4, 12 * 2 * math.pi / 360
"""Limits in m and radians."""


class PositionOnlyCartPoleEnv(PopgymEnv):
    """PositionOnlyCartPole: gymnasium's CartPole without the velocities.

    - Observation, [N, 2] float: the cart's position in m and the pole's angle in radians.
    - Action, [N] integer: push to the left (0) or to the right (1).
    - Reward: 1 / steps for each step, the last one included.
    - The episode terminates if the cart is further than 2.4 m from the middle, or the pole leans by more than 12
      degrees. It is truncated after its steps; both may be true.

    | level | steps |
    |---|---|
    | Easy | 200 |
    | Medium | 400 |
    | Hard | 600 |

    The first state is drawn evenly from [-0.05, 0.05]. States are float64, as in gymnasium. popgym means to punish the
    fall with -1, but gymnasium's reward at a fall is 1, so that never happens. With `fixed` it does.
    """

    levels = {"Easy": {"steps": 200}, "Medium": {"steps": 400}, "Hard": {"steps": 600}}
    rounds = 8
    steps: int

    def spaces(self) -> Spaces:
        """Return the specs and the length that follow from the level."""
        high = torch.tensor([2 * MAX_POSITION, 2 * MAX_ANGLE])
        return Spaces(Bounded(-high, high, shape=(2,), dtype=torch.float32), Categorical(2), self.steps)

    def _prepare_tables(self) -> None:
        self._acceleration = torch.tensor([-FORCE / MASS, FORCE / MASS], dtype=torch.float64, device=self.device)
        self._inertia = torch.tensor(HALF_LENGTH * 4 / 3 / GRAVITY, dtype=torch.float64, device=self.device)
        self._limits = torch.tensor([MAX_POSITION, MAX_ANGLE], dtype=torch.float64, device=self.device)
        self._reward = torch.full((self.num_envs, 1), 1 / self.steps, device=self.device)

    def _draw(self, count: int) -> Entries:
        state = torch.rand(count, 4, dtype=torch.float64, generator=self._generator, device=self.device)
        return {"state": state * 0.1 - 0.05}

    def _prepare(self, drawn: Entries) -> Entries:
        state = drawn["state"]
        return {"state": state, "observation": state[:, ::2].float()}

    def _play(self, action: Tensor, entries: Entries) -> Outcome:
        state = entries["state"]
        _, speed, angle, turn = state.unbind(1)
        sin, cos = angle.sin(), angle.cos()
        # The accelerations of the pole and the cart. Gravity is divided out, which saves an operation.
        push = torch.addcmul(self._acceleration.take(action), turn * turn, sin, value=POLE_MOMENT / MASS)
        inertia = torch.addcmul(self._inertia, cos, cos, value=-HALF_LENGTH * POLE_MASS / MASS / GRAVITY)
        turn_rate = torch.addcmul(sin, cos, push, value=-1 / GRAVITY) / inertia
        speed_rate = torch.addcmul(push, turn_rate, cos, value=-POLE_MOMENT / MASS)
        rates = torch.stack((speed, speed_rate, turn, turn_rate), 1)
        entries["state"] = state = torch.add(state, rates, alpha=TIME_STEP)
        positions = state[:, ::2]
        entries["observation"] = self._seen_of(state, positions)
        is_over = (positions.abs() > self._limits).any(1, keepdim=True)
        return Outcome(self._reward.masked_fill(is_over, -1.0) if self.fixed else self._reward, is_over)

    def _seen_of(self, state: Tensor, positions: Tensor) -> Tensor:
        """Return the observations [N, 2] in a step, from the states [N, 4] and their positions [N, 2]."""
        return positions.float()


class VelocityOnlyCartPoleEnv(PositionOnlyCartPoleEnv):
    """VelocityOnlyCartPole: gymnasium's CartPole without the positions.

    - Observation, [N, 2] float: the velocities of the cart (m/s) and the pole (radians/s).
    - The first observation of an episode has the two positions instead. That is a fault of popgym. With `fixed` it has
      the velocities.

    Everything else is as in `PositionOnlyCartPoleEnv`, the levels too.
    """

    def spaces(self) -> Spaces:
        """Return the specs and the length that follow from the level."""
        return super().spaces()._replace(observation=Unbounded((2,), dtype=torch.float32))

    def _prepare(self, drawn: Entries) -> Entries:
        entries = super()._prepare(drawn)
        return {**entries, "observation": entries["state"][:, 1::2].float()} if self.fixed else entries

    def _seen_of(self, state: Tensor, positions: Tensor) -> Tensor:
        return state[:, 1::2].float()


class NoisyPositionOnlyCartPoleEnv(PositionOnlyCartPoleEnv):
    """NoisyPositionOnlyCartPole: gymnasium's CartPole without the velocities, and with noisy positions.

    Normal noise is added to the two positions, and they are clipped to twice their limits. Everything else is as in
    `PositionOnlyCartPoleEnv`.

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

    def _prepare_tables(self) -> None:
        super()._prepare_tables()
        self._bound = torch.tensor([2 * MAX_POSITION, 2 * MAX_ANGLE], device=self.device)

    def _draw(self, count: int) -> Entries:
        noise = torch.randn(count, 2, generator=self._generator, device=self.device)
        return {**super()._draw(count), "noise": noise}

    def _prepare(self, drawn: Entries) -> Entries:
        entries = super()._prepare(drawn)
        return {**entries, "observation": self._noisy(entries["observation"], drawn["noise"])}

    def _seen_of(self, state: Tensor, positions: Tensor) -> Tensor:
        return self._noisy(positions.float(), self._random(torch.randn, 2))

    def _noisy(self, positions: Tensor, noise: Tensor) -> Tensor:
        return torch.add(positions, noise, alpha=self.deviation).clamp(-self._bound, self._bound)
