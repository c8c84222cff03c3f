"""The one TensorDict wrapper of a core."""

from __future__ import annotations

import warnings

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor
from torchrl.data import Composite, Unbounded
from torchrl.envs import TensorDictPrimer
from torchrl.modules import recurrent_mode

from cyborg_torchrl import keys
from cyborg_torchrl.cores import Core, State, restart


class Backbone(TensorDictModuleBase):
    """A recurrent core as a TensorDictModule that carries its memory state through the tensordict.

    By default, and in collectors, it takes one step. It reads the features [*B, F], `is_init` [*B, 1] and the state
    [*B, *shape], and writes the memory features [*B, D] and the next state under "next".

    In TorchRL's recurrent mode (`set_recurrent_mode(True)`, and inside its losses) the last batch dimension is time. It
    reads [*B, T, F], starts from the state of the first step, and restarts wherever `is_init` is true. It writes the
    memory features. States within a sequence are not written, since nothing reads them. Some cores also have metrics
    (write rates, prediction errors). They are written under "memory_metrics", for the loss.

    Episodes begin with the core's initial state (zero or learned), never with a stored one. So collection and training
    agree, and a learned initial state gets its gradient.

    Args:
        core: the recurrent network.
        in_key: features that the core reads.
        out_key: memory features that it writes.
        state_key: the nested tensordict that holds the named tensors of the state.
        is_init_key: flag of an episode's first step, written by `torchrl.envs.InitTracker`.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from cyborg_torchrl.cores import build_gru
        >>> backbone = Backbone(build_gru(3, hidden_size=8))
        >>> td = TensorDict(features=torch.zeros(2, 3), is_init=torch.ones(2, 1, dtype=torch.bool), batch_size=[2])
        >>> backbone(td)["next", "memory_state", "hidden"].shape
        torch.Size([2, 1, 8])
    """

    def __init__(
        self,
        core: Core,
        in_key: NestedKey = keys.FEATURES,
        out_key: NestedKey = keys.MEMORY_FEATURES,
        state_key: NestedKey = keys.MEMORY_STATE,
        is_init_key: NestedKey = keys.IS_INIT,
    ) -> None:
        super().__init__()
        self.core = core
        self.in_key, self.out_key = unravel_key(in_key), unravel_key(out_key)
        self.state_key, self.is_init_key = unravel_key(state_key), unravel_key(is_init_key)
        self.state_keys = {name: unravel_key((state_key, name)) for name in core.state_shapes}
        self.in_keys = [self.in_key, self.is_init_key, *self.state_keys.values()]
        self.out_keys = [self.out_key, *(self._next(key) for key in self.state_keys.values())]

    def make_tensordict_primer(self) -> TensorDictPrimer:
        """Return the transform that puts the state into an environment's tensordict at reset.

        TorchRL's collectors find it automatically with `auto_register_policy_transforms=True`.
        """
        spec = Composite()
        for name, shape in self.core.state_shapes.items():
            spec[self.state_keys[name]] = Unbounded(shape=shape, dtype=self._dtype())
        return TensorDictPrimer(spec, default_value=0.0, expand_specs=True)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Run one step, or a sequence in recurrent mode.

        Raises:
            KeyError: if the features or `is_init` are missing.
            ValueError: if the features have another width than the core expects.
        """
        self.run(tensordict)
        return tensordict

    def run(self, tensordict: TensorDictBase) -> State:
        """Do the same as `forward`, and return the state after the last step, {name: [*B, *shape]}."""
        return self._run_sequence(tensordict) if recurrent_mode() else self._run_step(tensordict)

    def _run_sequence(self, tensordict: TensorDictBase) -> State:
        x, is_init = self._inputs(tensordict)
        *batch_shape, steps, features = x.shape
        batch = x[..., 0, 0].numel()
        state = self._flat(self._state(tensordict, is_init, first_step=True), batch)
        y, last, terms = self.core.forward_with_terms(
            x.reshape(batch, steps, features), state, is_init.reshape(batch, steps)
        )
        tensordict.set(self.out_key, y.reshape(*batch_shape, steps, -1))
        for name, value in terms.items():
            tensordict.set((keys.MEMORY_METRICS, name), value.reshape(*batch_shape, steps, 1))
        return {name: value.reshape(*batch_shape, *value.shape[1:]) for name, value in last.items()}

    def _run_step(self, tensordict: TensorDictBase) -> State:
        x, is_init = self._inputs(tensordict)
        batch_shape, batch = x.shape[:-1], x.shape[:-1].numel()
        state = self._flat(self._state(tensordict, is_init, first_step=False), batch)
        state = restart(state, self.core.initial_state(batch), is_init.reshape(batch))
        y, state = self.core.step(x.reshape(batch, -1), state)
        tensordict.set(self.out_key, y.reshape(*batch_shape, -1))
        state = {name: value.reshape(*batch_shape, *value.shape[1:]) for name, value in state.items()}
        for name, key in self.state_keys.items():
            tensordict.set(self._next(key), state[name])
        return state

    def _flat(self, state: State, batch: int) -> State:
        """Return states with one batch dimension, in the core's precision; the initial state if there are none."""
        dtype, shapes = self._dtype(), self.core.state_shapes  # states may be stored in another precision
        flat = {name: value.reshape(batch, *shapes[name]).to(dtype) for name, value in state.items()}
        return flat or self.core.initial_state(batch)

    def _inputs(self, tensordict: TensorDictBase) -> tuple[Tensor, Tensor]:
        x = tensordict.get(self.in_key, None)
        is_init = tensordict.get(self.is_init_key, None)
        if x is None:
            raise KeyError(f"the backbone reads {self.in_key!r}, which is not in the tensordict.")
        if is_init is None:
            raise KeyError(
                f"the backbone reads {self.is_init_key!r} to know where episodes begin, and it is not in the "
                "tensordict: add torchrl.envs.InitTracker() to the environment."
            )
        if x.shape[-1] != self.core.in_features:
            raise ValueError(
                f"{self.in_key!r} has {x.shape[-1]} features; the core was built for {self.core.in_features}."
            )
        return x, is_init.squeeze(-1)

    def _state(self, tensordict: TensorDictBase, is_init: Tensor, *, first_step: bool) -> State:
        """Return the stored state, or {} if there is none. Warn if that loses memory in the middle of an episode."""
        values = {name: tensordict.get(key, None) for name, key in self.state_keys.items()}
        state: State = {name: value for name, value in values.items() if value is not None}
        missing = [key for name, key in self.state_keys.items() if name not in state]
        if missing:
            if not bool((is_init[..., 0] if first_step else is_init).all()):
                warnings.warn(
                    f"the memory state {missing} is not in the tensordict in the middle of an episode: memory "
                    "starts afresh there. Add backbone.make_tensordict_primer() to the environment, or let the "
                    "collector do it with auto_register_policy_transforms=True.",
                    stacklevel=5,
                )
            return {}
        if not first_step:
            return state
        dims = {name: len(shape) for name, shape in self.core.state_shapes.items()}
        return {name: value.select(-1 - dims[name], 0) for name, value in state.items()}

    def _dtype(self) -> torch.dtype:
        return next((p.dtype for p in self.core.parameters()), torch.get_default_dtype())

    @staticmethod
    def _next(key: NestedKey) -> NestedKey:
        return unravel_key((keys.NEXT, key))
