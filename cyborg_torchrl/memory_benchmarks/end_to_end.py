"""Four end-to-end tests of the training stack, with the names that the original document gives them.

Each test checks a property and reports the values that it measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from omegaconf import DictConfig
from tensordict import TensorDictBase
from torch import Tensor

from cyborg_torchrl import keys
from cyborg_torchrl.config import load_config
from cyborg_torchrl.data import RecurrentRolloutBuffer
from cyborg_torchrl.modules import PPOAgent
from cyborg_torchrl.objectives import add_advantages
from cyborg_torchrl.training.builders import build_agent, build_env, build_loss, build_trainer
from cyborg_torchrl.training.experiment import evaluate_agent

HORIZON, SEQ_LEN = 20, 11
SUCCESS, MAX_STEPS, EPISODES = 0.9, 12_000, 256
RATIO_ERROR = 1e-4


@dataclass(frozen=True)
class TestResult:
    """The result of a test, with the values that it measured."""

    __test__ = False  # pytest must not collect it

    name: str
    is_passed: bool
    detail: str


def run_end_to_end(
    backbone: str, seed: int, on_progress: Callable[[str, float], None] = lambda name, share: None
) -> list[TestResult]:
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
        cfg = load_config(
            overrides=[
                f"backbone={backbone}",
                f"env.horizon={HORIZON}",
                "logger=quiet",
                f"train.seed={seed}",
                f"train.total_timesteps={MAX_STEPS}",
            ]
        )
        torch.manual_seed(seed)
        try:
            results.append(TestResult(name, True, test(cfg)))
        except AssertionError as error:
            results.append(TestResult(name, False, str(error)))
    return results


def _buffer_sizes(cfg: DictConfig) -> str:
    """Check the rows, the order and the bytes of the buffer for several numbers of environments."""
    counts = (1, 3, 8)
    for num_envs in counts:
        agent, rollout = _act(cfg, num_envs)
        number = torch.arange(rollout.numel()).view(rollout.shape)
        buffer = _filled_buffer(rollout.set("number", number))
        rows = rollout.numel() // SEQ_LEN
        _expect(len(buffer) == rows, f"{num_envs} environments: {len(buffer)} rows instead of {rows}")
        chunks = [batch.get("number") for batch in buffer]
        order = torch.cat([chunk.flatten() for chunk in chunks]).sort().values
        is_exact = torch.equal(order, number.flatten())
        _expect(is_exact, f"{num_envs} environments: an epoch does not hold every step exactly once")
        is_row = all(bool((chunk[:, 1:] - chunk[:, :-1] == 1).all()) for chunk in chunks)
        _expect(is_row, f"{num_envs} environments: a chunk is no sequence of one environment")
        size = sum(value[0].numel() * value.element_size() for value in agent.backbone.core.initial_state(1).values())
        _expect(buffer.state_bytes() == rows * size, f"states take {buffer.state_bytes()} bytes, not {rows * size}")
    return f"{', '.join(map(str, counts))} environments: one state a chunk, every step once an epoch"


def _states_come_back(cfg: DictConfig) -> str:
    """Check that each sampled chunk starts with the state that its environment had at that step."""
    agent, rollout = _act(cfg, 6)
    number = torch.arange(rollout.numel()).view(rollout.shape)
    buffer = _filled_buffer(rollout.set("number", number))
    chunks = 0
    for batch in buffer:
        first = batch.get("number")[:, 0]
        for name, key in agent.backbone.state_keys.items():
            expected = rollout.get(key).flatten(0, 1)[first]
            is_same = torch.equal(batch.get(key)[:, 0], expected)
            _expect(is_same, f"a chunk came back with another '{name}' than it was stored with")
        chunks += len(first)
    middle = rollout[:, SEQ_LEN :: HORIZON + 2]
    spread = max(float(middle.get(key).float().std(0).max()) for key in agent.backbone.state_keys.values())
    _expect(spread > 0, "all environments are in the same state, so the test could not fail")
    return f"{chunks} chunks of {SEQ_LEN} steps came back with their own states, to the last bit"


def _training_succeeds(cfg: DictConfig) -> str:
    """Check that PPO learns to name a cue that it saw 20 steps before."""
    trainer, agent, _ = build_trainer(cfg)
    success, largest_error = 0.0, 0.0
    try:
        for metrics in trainer.run():
            error = metrics["ratio_error"]
            _expect(error <= RATIO_ERROR, f"|log ratio| before an update is {error:g}")
            largest_error = max(largest_error, error)
            success = evaluate_agent(cfg, agent, EPISODES).success_rate or 0.0
            if success >= SUCCESS:
                break
    finally:
        trainer.close()
    _expect(success >= SUCCESS, f"success {success:.2f} after {trainer.num_steps:,} steps; chance is 0.25")
    return f"success {success:.2f} after {trainer.num_steps:,} steps (chance 0.25), |log ratio| {largest_error:.1g}"


def _gradients_flow(cfg: DictConfig) -> str:
    """Check that the last step's loss reaches the first observation, and that every parameter gets a gradient."""
    agent, rollout = _act(cfg, 6)
    add_advantages(rollout, agent.get_value_operator(), gamma=0.99, gae_lambda=0.95)
    loss = build_loss(cfg, agent)
    batch = rollout[:, : HORIZON + 2].clone()
    mask = torch.zeros(batch.shape, dtype=torch.bool)
    mask[:, -1] = True
    batch.set(keys.TRAIN_MASK, mask)
    observation = batch.get(keys.OBSERVATION).requires_grad_()
    losses = loss(batch)
    (grad,) = torch.autograd.grad(losses["loss_objective"] + losses["loss_critic"], [observation])
    reach = grad[:, 0].abs().sum(-1)
    _expect(bool((reach > 0).all()), f"the gradient of the query, {HORIZON + 1} steps later, does not reach the cue")
    losses = loss(rollout)
    sum(value for name, value in losses.items() if name.startswith("loss_")).backward()
    silent = [name for name, parameter in agent.named_parameters() if not _is_live(parameter.grad)]
    _expect(not silent, f"no gradient for {', '.join(silent)}")
    parameters = sum(parameter.numel() for parameter in agent.parameters())
    return f"from the query to the cue {HORIZON + 1} steps back, and to all {parameters:,} parameters"


@torch.no_grad()
def _act(cfg: DictConfig, num_envs: int) -> tuple[PPOAgent, TensorDictBase]:
    """Return an agent and a rollout of two episodes of each environment."""
    env = build_env(cfg, num_envs=num_envs)
    agent = build_agent(cfg, env)
    env.append_transform(agent.backbone.make_tensordict_primer())
    rollout = env.rollout(2 * (HORIZON + 2), agent, break_when_any_done=False)
    return agent, rollout.contiguous()


def _filled_buffer(rollout: TensorDictBase) -> RecurrentRolloutBuffer:
    buffer = RecurrentRolloutBuffer(rollout.numel(), SEQ_LEN, batch_size=3)
    buffer.store(rollout)
    return buffer


def _is_live(grad: Tensor | None) -> bool:
    return grad is not None and bool(grad.isfinite().all()) and bool((grad != 0).any())


def _expect(is_so: bool, otherwise: str) -> None:
    """Raise AssertionError unless the condition holds, also under `python -O`."""
    if not is_so:
        raise AssertionError(otherwise)
