"""Other libraries' recurrent PPO on the same task, for the same number of steps, epochs and minibatches."""

from __future__ import annotations

import atexit
import importlib.util
import json
import subprocess
import tempfile
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Categorical

from benchmarks.speed.measure import Subject
from benchmarks.speed.subjects import Case
from cyborg_torchrl.envs import DelayedCueEnv

LEARNING_RATE, CLIP, ENTROPY, VALUE, GAMMA, LAMBDA = 2.5e-4, 0.2, 0.01, 0.5, 0.99, 0.95


class MissingPackage(Exception):
    """A library is not installed."""


class LoopPPO:
    """Recurrent PPO in the style of CleanRL's single files.

    A Python loop steps nn.LSTM and resets its state where episodes begin. Sequences are whole rollouts, and minibatches
    consist of environments. It was written for this benchmark from the description of the method.

    Source: the method of Huang et al. (2022), "CleanRL".

    Args:
        case: sizes of the comparison.
    """

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        self.case = case
        self.task = DelayedCueEnv(case.num_envs, horizon=case.horizon, seed=0)
        width, features = case.width, self.task.observation_spec["observation"].shape[-1]
        self.encoder = nn.Sequential(nn.Linear(features, width), nn.Tanh())
        self.memory = nn.LSTM(width, width)
        self.policy, self.value = nn.Linear(width, self.task.cues), nn.Linear(width, 1)
        modules = (self.encoder, self.memory, self.policy, self.value)
        self.parameters = [parameter for module in modules for parameter in module.parameters()]
        self.optimizer = torch.optim.Adam(self.parameters, LEARNING_RATE, eps=1e-5)
        self.shown, _ = self.task.restart()
        zero = torch.zeros(1, case.num_envs, width)
        self.state, self.begins = (zero, zero.clone()), torch.ones(case.num_envs)

    def __call__(self) -> int:
        """Run one rollout and its update. Return its steps."""
        steps, envs = self.case.steps, self.case.num_envs
        first = tuple(part.clone() for part in self.state)
        shown = torch.zeros(steps, envs, self.shown.shape[-1])
        actions = torch.zeros(steps, envs, dtype=torch.long)
        log_probs, rewards, begins, values = torch.zeros(4, steps, envs).unbind(0)
        with torch.no_grad():
            for t in range(steps):
                shown[t], begins[t] = self.shown, self.begins
                hidden, self.state = self._remember(self.encoder(self.shown)[None], self.begins[None], self.state)
                chosen = Categorical(logits=self.policy(hidden[0]))
                actions[t] = chosen.sample()
                log_probs[t], values[t] = chosen.log_prob(actions[t]), self.value(hidden[0]).squeeze(-1)
                self.shown, _, reward, over = self.task.advance(actions[t])
                rewards[t], is_over = reward.squeeze(-1), over.squeeze(-1)
                if is_over.any():
                    self.shown, _ = self.task.restart(is_over)
                self.begins = is_over.float()
            hidden, _ = self._remember(self.encoder(self.shown)[None], self.begins[None], self.state)
            advantages = self._advantages(rewards, values, begins, self.value(hidden[0]).squeeze(-1))
        returns = advantages + values
        for _ in range(self.case.n_epochs):
            for at in torch.randperm(envs).tensor_split(self.case.num_minibatches):
                self._learn(
                    shown[:, at], begins[:, at], tuple(part[:, at] for part in first), actions[:, at],
                    log_probs[:, at], advantages[:, at], returns[:, at],
                )  # fmt: skip
        return steps * envs

    def _remember(self, features: Tensor, begins: Tensor, state: tuple[Tensor, ...]):
        outputs = []
        for x_t, begins_t in zip(features, begins, strict=True):
            keep = (1.0 - begins_t).view(1, -1, 1)
            y_t, state = self.memory(x_t[None], tuple(keep * part for part in state))
            outputs.append(y_t)
        return torch.cat(outputs), state

    def _advantages(self, rewards: Tensor, values: Tensor, begins: Tensor, last_value: Tensor) -> Tensor:
        advantages, carried = torch.zeros_like(rewards), torch.zeros_like(last_value)
        next_value, goes_on = last_value, 1.0 - self.begins
        for t in reversed(range(rewards.shape[0])):
            delta = rewards[t] + GAMMA * next_value * goes_on - values[t]
            carried = delta + GAMMA * LAMBDA * goes_on * carried
            advantages[t], next_value, goes_on = carried, values[t], 1.0 - begins[t]
        return advantages

    def _learn(self, shown, begins, state, actions, old_log_probs, advantages, returns) -> None:
        hidden, _ = self._remember(self.encoder(shown), begins, state)
        dist = Categorical(logits=self.policy(hidden))
        ratio = (dist.log_prob(actions) - old_log_probs).exp()
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        loss = torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - CLIP, 1 + CLIP)).mean()
        loss = loss + VALUE * 0.5 * (self.value(hidden).squeeze(-1) - returns).square().mean()
        loss = loss - ENTROPY * dist.entropy().mean()
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 0.5)
        self.optimizer.step()


def cleanrl_style(case: Case) -> Subject:
    """Build the CleanRL-style subject."""
    return "CleanRL-style LSTM", LoopPPO(case)


def sb3(case: Case, *, is_shared: bool = False) -> Subject:
    """Build sb3-contrib's RecurrentPPO with LSTMs of the same width.

    Args:
        case: sizes of the comparison.
        is_shared: one LSTM for actor and critic without further layers, as ours. False: its defaults, two LSTMs with
            two layers of 64 units each.

    Raises:
        MissingPackage: without sb3-contrib.
    """
    if importlib.util.find_spec("sb3_contrib") is None:
        raise MissingPackage("sb3-contrib is not installed: pip install sb3-contrib")
    from sb3_contrib import RecurrentPPO

    frames = case.num_envs * case.steps
    shared = {"net_arch": [], "enable_critic_lstm": False, "shared_lstm": True}
    model = RecurrentPPO(
        "MlpLstmPolicy",
        _vec_env(case),
        n_steps=case.steps,
        batch_size=frames // case.num_minibatches,
        n_epochs=case.n_epochs,
        policy_kwargs={"lstm_hidden_size": case.width, **(shared if is_shared else {})},
        device="cpu",
        seed=0,
    )

    def run() -> int:
        model.learn(frames, reset_num_timesteps=False)
        return frames

    return "sb3-contrib RecurrentPPO" + (", one LSTM" if is_shared else ""), run


def _vec_env(case: Case):
    """Build the task as one of sb3's vector environments, with one call for all environments."""
    import gymnasium
    from stable_baselines3.common.vec_env import VecEnv

    class Task(VecEnv):
        def __init__(self) -> None:
            self.task = DelayedCueEnv(case.num_envs, horizon=case.horizon, seed=0)
            features = self.task.observation_spec["observation"].shape[-1]
            space = gymnasium.spaces.Box(0.0, 1.0, (features,), np.float32)
            super().__init__(case.num_envs, space, gymnasium.spaces.Discrete(self.task.cues))

        def reset(self):
            return self.task.restart()[0].numpy()

        def step_async(self, actions) -> None:
            self.actions = torch.as_tensor(actions)

        def step_wait(self):
            shown, _, reward, over = self.task.advance(self.actions)
            infos: list[dict] = [{} for _ in range(case.num_envs)]
            is_over = over.squeeze(-1)
            if is_over.any():
                for index in is_over.nonzero().flatten().tolist():
                    infos[index] = {"terminal_observation": shown[index].numpy(), "TimeLimit.truncated": False}
                shown, _ = self.task.restart(is_over)
            return shown.numpy(), reward.squeeze(-1).numpy(), is_over.numpy(), infos

        def close(self) -> None: ...

        def get_attr(self, attr_name, indices=None):
            return [None] * case.num_envs

        def set_attr(self, attr_name, value, indices=None) -> None: ...

        def env_method(self, method_name, *args, indices=None, **kwargs):
            return [None] * case.num_envs

        def env_is_wrapped(self, wrapper_class, indices=None):
            return [False] * case.num_envs

    return Task()


BASELINES: dict[str, Callable[[Case], Subject]] = {
    "sb3": sb3,
    "sb3_shared": partial(sb3, is_shared=True),
    "cleanrl": cleanrl_style,
}


def pufferlib(case: Case, python: str | None) -> Subject:
    """Build PufferLib's PPO with its LSTM, in another process.

    Args:
        case: sizes of the comparison; `seq_len` is its `bptt_horizon`.
        python: interpreter of a virtual environment with PufferLib.

    Raises:
        MissingPackage: if there is no such interpreter, or it has no PufferLib.
    """
    if python is None:
        raise MissingPackage("name the interpreter of an environment that has it: --pufferlib-python")
    sizes = {**case._asdict(), "steps": case.steps, "threads": torch.get_num_threads()}
    script = Path(__file__).with_name("pufferlib_process.py")
    process = subprocess.Popen(
        [python, str(script), json.dumps(sizes)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tempfile.gettempdir(),
    )  # fmt: skip
    atexit.register(process.kill)
    asked, answers, complaints = process.stdin, process.stdout, process.stderr
    assert asked is not None
    assert answers is not None
    assert complaints is not None
    ready = answers.readline().split()
    if ready[:1] != ["ready"]:
        last = (complaints.read().strip().splitlines() or ["it ended"])[-1]
        raise MissingPackage(f"{python} does not run it: {last}")
    threading.Thread(target=complaints.read, daemon=True).start()  # so that the pipe never fills

    def run() -> int:
        asked.write("\n")
        asked.flush()
        return int(answers.readline())

    return f"PufferLib {ready[1]} LSTM", run
