"""Policies that are checked, ours and TorchRL's, and where they act."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tensordict import TensorDictBase
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictModuleBase,
)
from torch import nn
from torchrl.envs import EnvBase
from torchrl.modules import GRUModule, LSTMModule, set_recurrent_mode
from torchrl.modules.utils import get_primers_from_module

from cyborg_torchrl.cores import Core, State, unroll

THEIRS = ("GRUModule", "LSTMModule")
NUM_ENVS = 4


class Detached(Core):
    """The fault: a core whose state is detached before each step of a sequence."""

    def __init__(self, core: Core) -> None:
        super().__init__()
        self.core = core
        self.in_features, self.out_features = core.in_features, core.out_features
        self.state_shapes = core.state_shapes

    def initial_state(self, batch: int) -> State:
        return self.core.initial_state(batch)

    def step(self, x: torch.Tensor, state: State) -> tuple[torch.Tensor, State]:
        return self.core.step(x, {name: value.detach() for name, value in state.items()})

    def forward(self, x: torch.Tensor, state: State, is_init: torch.Tensor) -> tuple[torch.Tensor, State]:
        return unroll(self, x, state, is_init)


class DetachedModule(TensorDictModuleBase):
    """The same fault around one of TorchRL's modules."""

    def __init__(self, module: TensorDictModuleBase) -> None:
        super().__init__()
        self.module = module
        self.in_keys, self.out_keys = module.in_keys, module.out_keys
        self.state_keys = [key[1] for key in module.out_keys[1:]]

    def make_tensordict_primer(self) -> object:
        return self.module.make_tensordict_primer()

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        if not self.module.recurrent_mode:
            return self.module(tensordict)
        outputs = []
        state = tensordict[:, 0].select(*self.state_keys)
        for t in range(tensordict.shape[1]):
            step = tensordict[:, t].select(self.in_keys[0], "is_init").update(state)
            with set_recurrent_mode(False):
                step = self.module(step)
            outputs.append(step[self.out_keys[0]])
            state = step["next"].select(*self.state_keys).detach()
        return tensordict.set(self.out_keys[0], torch.stack(outputs, 1))


def build_theirs(kind: str, *, is_detached: bool = False) -> ProbabilisticTensorDictSequential:
    """An actor and a value head around one of TorchRL's recurrent modules."""
    module_class, states = (GRUModule, ["recurrent_state"]) if kind == "GRUModule" else (LSTMModule, ["h", "c"])
    recurrent = module_class(
        8, 8, 2, in_keys=["embedding", *states], out_keys=["memory", *(("next", key) for key in states)]
    )
    return ProbabilisticTensorDictSequential(
        TensorDictModule(nn.Linear(3, 8), in_keys=["observation"], out_keys=["embedding"]),
        DetachedModule(recurrent) if is_detached else recurrent,
        TensorDictModule(nn.Linear(8, 3), in_keys=["memory"], out_keys=["logits"]),
        TensorDictModule(nn.Linear(8, 1), in_keys=["memory"], out_keys=["state_value"]),
        ProbabilisticTensorDictModule(
            in_keys=["logits"],
            out_keys=["action"],
            distribution_class=torch.distributions.Categorical,
            return_log_prob=True,
            log_prob_key="action_log_prob",
        ),
    )


@pytest.fixture
def build_policy(build_small_core: Callable[[str], Core], make_agent: Callable) -> Callable[..., TensorDictModuleBase]:
    """Builder of a policy for the environment of `primed_env`, `build(name, is_detached=False)`; seeded by torch."""

    def build(name: str, *, is_detached: bool = False) -> TensorDictModuleBase:
        if name in THEIRS:
            return build_theirs(name, is_detached=is_detached)
        core = build_small_core(name)
        return make_agent(Detached(core) if is_detached else core)

    return build


@pytest.fixture
def primed_env(make_env: Callable) -> Callable[..., EnvBase]:
    """Maker of an environment with `is_init` and a policy's memory state."""

    def make(policy: TensorDictModuleBase, num_envs: int = NUM_ENVS, seed: int = 0, **options: float) -> EnvBase:
        env = make_env(num_envs, seed, **options)
        env.append_transform(get_primers_from_module(policy))
        return env

    return make
