"""TorchRL: `GRUModule` or `LSTMModule` in a `ProbabilisticActor`, acting in TorchRL's own collector."""

from __future__ import annotations

import torch
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictSequential,
)
from torch import nn
from torchrl.collectors import Collector
from torchrl.envs import GymWrapper, InitTracker, SerialEnv, TransformedEnv
from torchrl.modules import GRUModule, LSTMModule, set_recurrent_mode
from torchrl.modules.utils import get_primers_from_module
from torchrl.objectives.value import GAE

from benchmarks.honesty.common import ACTIONS, FEATURES, NUM_ENVS, STEPS, WIDTH, NoiseEnv
from cyborg_torchrl.checks import Report, check_recurrent

PACKAGE = "torchrl"
KIND, GAMMA = "GRUModule", 0.9


def build(kind: str) -> ProbabilisticTensorDictSequential:
    """Return an actor with a value head on one of TorchRL's recurrent modules."""
    module, states = (GRUModule, ["state"]) if kind == "GRUModule" else (LSTMModule, ["h", "c"])
    outputs = ["memory", *(("next", key) for key in states)]
    return ProbabilisticTensorDictSequential(
        module(FEATURES, WIDTH, in_keys=["observation", *states], out_keys=outputs),
        TensorDictModule(nn.Linear(WIDTH, ACTIONS), ["memory"], ["logits"]),
        TensorDictModule(nn.Linear(WIDTH, 1), ["memory"], ["state_value"]),
        ProbabilisticTensorDictModule(
            in_keys=["logits"],
            out_keys=["action"],
            distribution_class=torch.distributions.Categorical,
            return_log_prob=True,
            log_prob_key="action_log_prob",
        ),
    )


def build_env(seed: int, policy: nn.Module) -> TransformedEnv:
    """Return environments with the policy's memory states."""

    def make(index: int) -> GymWrapper:
        return GymWrapper(NoiseEnv(100 * seed + index), categorical_action_encoding=True)

    makers = [lambda index=index: make(index) for index in range(NUM_ENVS)]
    env = TransformedEnv(SerialEnv(NUM_ENVS, makers), InitTracker())
    env.append_transform(get_primers_from_module(policy))
    return env


def check(seed: int, kind: str = KIND) -> tuple[Report, Report]:
    """Check the policy, and the collector's second batch with the values of the next observations."""
    torch.manual_seed(seed)
    policy = build(kind)
    report = check_recurrent(policy, build_env(seed, policy), seed=seed)
    size = NUM_ENVS * STEPS
    collector = Collector(build_env(seed, policy), policy, frames_per_batch=size, total_frames=2 * size)
    rollout = [batch.clone() for batch in collector][1]
    collector.shutdown()
    critic = TensorDictSequential(policy[0], policy[2])
    # One call over each row, with room for the last observations of all its episodes.
    gae = GAE(gamma=GAMMA, lmbda=0.95, value_network=critic, shifted=True, shifted_budget=STEPS)
    with torch.no_grad(), set_recurrent_mode(True):
        rollout["next", "state_value"] = gae(rollout.clone())["next", "state_value"]
    return report, check_recurrent(policy, rollout=rollout, seed=seed, chunk_lengths=(1, 5, 12))
