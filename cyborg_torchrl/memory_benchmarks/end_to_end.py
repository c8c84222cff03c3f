"""Four end-to-end tests of the training stack, with the names that the original document gives them.

Each test checks a property and reports the values that it measured.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

import torch
from omegaconf import DictConfig
from tensordict import TensorDictBase
from torchrl.envs import EnvBase

from cyborg_torchrl import keys
from cyborg_torchrl.config import load_config
from cyborg_torchrl.data import RecurrentRolloutBuffer
from cyborg_torchrl.modules import PPOAgent
from cyborg_torchrl.objectives import add_advantages
from cyborg_torchrl.training.builders import build_agent, build_env, build_loss, build_trainer
from cyborg_torchrl.training.run_evaluation import evaluate_agent

HORIZON, SEQ_LEN = 20, 11
SUCCESS, MAX_STEPS, EPISODES = 0.9, 12_000, 256
RATIO_ERROR = 1e-4


@dataclass(frozen=True)
class EndToEndResult:
    """The result of a test, with the values that it measured."""

    name: str
    is_passed: bool
    detail: str


def run_end_to_end(
    backbone: str, seed: int, on_progress: Callable[[str, float], None] = lambda name, share: None
) -> list[EndToEndResult]:
    """Run the four tests with a backbone on delayed cue with 20 blank steps. It takes some seconds."""
    tests = {
        "buffer size for vectorised environments": _buffer_sizes,
        "state storage and retrieval": _states_come_back,
        "full training loop": _training_succeeds,
        "gradient flow": _gradients_flow,
    }
    results = []
    for index, (name, test) in enumerate(tests.items()):
        on_progress(name, index / len(tests))
        cfg = configuration(backbone, seed)
        torch.manual_seed(seed)
        try:
            results.append(EndToEndResult(name, True, test(cfg)))
        except AssertionError as error:
            results.append(EndToEndResult(name, False, str(error)))
    return results


def configuration(backbone: str, seed: int) -> DictConfig:
    """Return the configuration of the tests."""
    sizes = [f"env.horizon={HORIZON}", f"train.total_timesteps={MAX_STEPS}"]
    return load_config(overrides=[f"backbone={backbone}", f"train.seed={seed}", "logger=quiet", *sizes])


def build_policy(cfg: DictConfig, num_envs: int) -> tuple[PPOAgent, EnvBase]:
    """Build an untrained agent, and its environment with the agent's memory states."""
    env = build_env(cfg, num_envs=num_envs)
    agent = build_agent(cfg, env)
    env.append_transform(agent.backbone.make_tensordict_primer())
    return agent, env


def _buffer_sizes(cfg: DictConfig) -> str:
    """Check the rows, the order and the bytes of the buffer for several numbers of environments."""
    counts = (1, 3, 8)
    for num_envs in counts:
        agent, rollout, buffer = _act(cfg, num_envs)
        expected = rollout.get("number").reshape(-1, SEQ_LEN)
        chunks = torch.cat([batch.get("number") for batch in buffer])
        is_exact = torch.equal(chunks[chunks[:, 0].argsort()], expected)
        _expect(is_exact, f"{num_envs} environments: an epoch does not hold the {len(expected)} chunks exactly once")
        size = sum(value[0].numel() * value.element_size() for value in agent.backbone.core.initial_state(1).values())
        wanted = len(expected) * size
        _expect(buffer.state_bytes() == wanted, f"states take {buffer.state_bytes()} bytes, not {wanted}")
    return f"{', '.join(map(str, counts))} environments: one state a chunk, every step once an epoch"


def _states_come_back(cfg: DictConfig) -> str:
    """Check that each sampled chunk starts with the state that its environment had at that step."""
    agent, rollout, buffer = _act(cfg, 6)
    for batch in buffer:
        first = batch.get("number")[:, 0]
        for name, key in agent.backbone.state_keys.items():
            expected = rollout.get(key).flatten(0, 1)[first]
            is_same = torch.equal(batch.get(key)[:, 0], expected)
            _expect(is_same, f"a chunk came back with another '{name}' than it was stored with")
    middle = rollout[:, SEQ_LEN]
    has_spread = any(bool(middle.get(key).float().std(0).any()) for key in agent.backbone.state_keys.values())
    _expect(has_spread, "all environments are in the same state, so the test could not fail")
    return f"{len(buffer)} chunks of {SEQ_LEN} steps came back with their own states, to the last bit"


def _training_succeeds(cfg: DictConfig) -> str:
    """Check that PPO learns to name a cue that it saw 20 steps before."""
    trainer, agent, _ = build_trainer(cfg)
    success, error = 0.0, 0.0
    with closing(trainer):
        for metrics in trainer.run():
            error = max(error, metrics["ratio_error"])
            _expect(error <= RATIO_ERROR, f"|log ratio| before an update is {error:g}")
            success = evaluate_agent(cfg, agent, EPISODES).success_rate or 0.0
            if success >= SUCCESS:
                break
    result = f"success {success:.2f} after {trainer.num_steps:,} steps (chance 0.25), |log ratio| {error:.1g}"
    _expect(success >= SUCCESS, result)
    return result


def _gradients_flow(cfg: DictConfig) -> str:
    """Check that the loss of the query's step reaches the cue, and gives every parameter a gradient."""
    agent, rollout, _ = _act(cfg, 6)
    add_advantages(rollout, agent.get_value_operator(), gamma=0.99, gae_lambda=0.95)
    is_query = torch.zeros(rollout.shape, dtype=torch.bool)
    is_query[:, HORIZON + 1 :: HORIZON + 2] = True
    observation = rollout.get(keys.OBSERVATION).requires_grad_()
    losses = build_loss(cfg, agent)(rollout.set(keys.TRAIN_MASK, is_query))
    parameters = dict(agent.named_parameters())
    total = losses["loss_objective"] + losses["loss_critic"]
    reach, *gradients = torch.autograd.grad(total, [observation, *parameters.values()], materialize_grads=True)
    reaches_all = bool(reach[:, 0].abs().sum(-1).all())
    _expect(reaches_all, f"the gradient of the query, {HORIZON + 1} steps later, does not reach the cue")
    silent = [name for name, grad in zip(parameters, gradients, strict=True) if not 0.0 < grad.norm() < torch.inf]
    _expect(not silent, f"no gradient for {', '.join(silent)}")
    number = sum(parameter.numel() for parameter in parameters.values())
    return f"from the query to the cue {HORIZON + 1} steps back, and to all {number:,} parameters"


@torch.no_grad()
def _act(cfg: DictConfig, num_envs: int) -> tuple[PPOAgent, TensorDictBase, RecurrentRolloutBuffer]:
    """Return an agent, a rollout of two episodes with the number of each step, and a buffer that holds it."""
    agent, env = build_policy(cfg, num_envs)
    rollout = env.rollout(2 * (HORIZON + 2), agent, break_when_any_done=False).contiguous()
    rollout.set("number", torch.arange(rollout.numel()).view(rollout.shape))
    buffer = RecurrentRolloutBuffer(rollout.numel(), SEQ_LEN, batch_size=3)
    buffer.store(rollout)
    return agent, rollout, buffer


def _expect(is_so: bool, otherwise: str) -> None:
    """Raise AssertionError unless the condition holds, also under `python -O`."""
    if not is_so:
        raise AssertionError(otherwise)
