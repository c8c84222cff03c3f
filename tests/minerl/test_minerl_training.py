"""Training on MineRL's real client against protocol stubs, one of which is killed: no step is lost.

Neither Minecraft nor learning is tested.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torchrl.envs.utils import check_env_specs

from cyborg_torchrl.config import load_config
from cyborg_torchrl.envs import build_treechop
from cyborg_torchrl.training.builders import build_trainer
from cyborg_torchrl.training.experiment import run_experiment

pytestmark = [pytest.mark.minerl, pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")]
STEPS = 32


def shown_step(pixels: Tensor) -> Tensor:
    """The steps that the stub's pictures [*B, 64, 64, C] show; the oldest, where frames are stacked."""
    low, high = pixels[..., 0, 0, 0].long(), pixels[..., 0, 0, 1].long()
    return low + 256 * high


def start_two(launcher: Any) -> int:
    """Stubs on two neighbouring ports; returns the first."""
    for _ in range(100):
        first = launcher.start()
        try:
            launcher.start("--port", str(first.port + 1))
        except ValueError:  # taken
            continue
        return first.port
    raise AssertionError("no neighbouring ports are free")


def config(port: int, *overrides: str) -> Any:
    small = ("backbone.hidden_size=16", "encoder.features=16", "train.num_minibatches=2", "train.n_epochs=1")
    sizes = (f"train.n_steps={STEPS}", "train.seq_len=8", "train.burn_in=4", f"train.total_timesteps={4 * STEPS}")
    env = ("env.backend=minerl", f"env.port={port}", "env.num_envs=2", "logger=quiet")
    return load_config("treechop_ppo_recurrent", [*small, *sizes, *env, *overrides])


@pytest.mark.parametrize("moment", [0, 1, 13, STEPS - 1])
def test_killing_minecraft_loses_no_training_step(moment: int, launcher: Any) -> None:
    """Environment 0's stub is killed before its step `moment`, and started again half a second later on its port."""
    port = start_two(launcher)
    victim = launcher.stubs[-2]
    trainer = build_trainer(config(port)).trainer
    acted = iter(range(10**6))
    policy = trainer.collector.policy

    def restart() -> None:
        time.sleep(0.5)
        launcher.start("--port", str(port))

    thread = threading.Thread(target=restart)

    def killing(tensordict: Any) -> Any:
        if next(acted) == moment:
            victim.end()
            thread.start()
        return policy(tensordict)

    trainer.collector.policy = killing
    rollout = trainer.collector.rollout()
    thread.join()
    steps = rollout.steps
    following = steps["next"]
    assert steps.shape == (2, STEPS)
    is_lost = torch.zeros(2, STEPS, dtype=torch.bool)
    is_lost[0, moment] = True
    assert torch.equal(following["truncated"].squeeze(-1), is_lost)
    assert torch.equal(following["done"].squeeze(-1), is_lost)
    assert not following["terminated"].any()
    assert not following["reward"].any()
    assert torch.equal(following["pixels"][0, moment], steps["pixels"][0, moment])
    shown = list(range(moment + 1)) + list(range(STEPS - moment - 1))
    assert shown_step(steps["pixels"]).tolist() == [shown, list(range(STEPS))]
    metrics = trainer.update(rollout)
    assert trainer.num_steps == 2 * STEPS
    assert metrics["ratio_error"] <= 1e-4
    trainer.collector.policy = policy
    assert trainer.collector.rollout().steps.shape == (2, STEPS)
    trainer.close()


def test_a_run_is_made_by_configuration_alone(launcher: Any, tmp_path: Any) -> None:
    launcher.arguments = ("--reward-every", "4")
    overrides = (f"logger.base_dir={tmp_path}", "env.max_episode_steps=16", "logger.eval_episodes=2")
    summary = run_experiment(config(start_two(launcher), *overrides))
    assert summary["task"] == "minerl_treechop"
    assert summary["total_timesteps"] == 4 * STEPS
    assert summary["mean_reward"] == 4.0
    assert summary["success_rate"] is None


def test_five_actions_skip_and_stack_four(launcher: Any, commands_of: Callable[[], list[str]]) -> None:
    launcher.arguments = ("--log-steps", "--reward-every", "1")
    port = start_two(launcher)
    env = build_treechop(2, backend="minerl", actions="five", max_episode_steps=22, port=port, seed=0)
    assert env.max_episode_steps == 6
    first = env.reset()["pixels"]
    assert first.shape == (2, 64, 64, 12)
    assert first.dtype == torch.uint8
    rollout = env.rollout(6)
    newest = rollout["next", "pixels"][..., -3:]
    assert shown_step(newest).tolist() == [[4, 8, 12, 16, 20, 22]] * 2
    oldest = rollout["next", "pixels"][..., :3]
    assert shown_step(oldest).tolist() == [[0, 0, 0, 4, 8, 12]] * 2
    assert rollout["next", "reward"].squeeze(-1).tolist() == [[4.0] * 5 + [2.0]] * 2
    assert rollout["next", "truncated"].squeeze(-1).tolist() == [[False] * 5 + [True]] * 2
    env.close()
    assert len(commands_of()) == 44


def test_specs_hold_in_processes(launcher: Any) -> None:
    port = start_two(launcher)
    env = build_treechop(2, backend="minerl", max_episode_steps=8, port=port, workers=2, seed=0)
    check_env_specs(env)
    assert shown_step(env.rollout(8)["pixels"]).tolist() == [list(range(8))] * 2
    env.close()


def test_environments_play_in_different_worlds(launcher: Any) -> None:
    env = build_treechop(2, backend="minerl", max_episode_steps=4, port=start_two(launcher), seed=5)
    env.rollout(8, break_when_any_done=False)
    env.close()
    stubs = launcher.stubs[-2:]
    for stub in stubs:
        stub.end()
    seeds = [int(mission["token"].split(":")[5]) for stub in stubs for mission in stub.missions]
    assert len(seeds) >= 4
    assert len(set(seeds)) == len(seeds)


def test_the_wrapper_is_not_reset_by_a_seed(launcher: Any) -> None:
    """TorchRL's own wrapper would start a mission that nobody asked for."""
    env = build_treechop(1, backend="minerl", port=start_two(launcher), seed=5)
    env.reset()
    env.set_seed(5)
    env.set_seed(6)
    env.close()
    stub = launcher.stubs[-2]
    stub.end()
    assert len(stub.missions) == 1
