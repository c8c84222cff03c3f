"""Steps of an agent's networks on flat entries: of its backbone alone, and of all of them."""

from __future__ import annotations

import torch
from tensordict.utils import unravel_key

from cyborg_torchrl import keys
from cyborg_torchrl.collectors.entries import Call, Entries
from cyborg_torchrl.cores import State, restart
from cyborg_torchrl.modules import Backbone
from cyborg_torchrl.modules.acting import NativeStep, Parts


class BackboneStep:
    """One step of a core; restarts cost nothing where no episode begins.

    Args:
        backbone: around the core.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.backbone, self.initial, self.may_begin = backbone, {}, True
        self.dtype = next((p.dtype for p in backbone.core.parameters()), torch.get_default_dtype())
        self.after = {name: unravel_key((keys.NEXT, key)) for name, key in backbone.state_keys.items()}

    def begin(self, num_envs: int) -> None:
        """Called before a rollout."""
        self.initial = self.backbone.core.initial_state(num_envs)

    def __call__(self, entries: Entries) -> None:
        """Reads features and state; writes what is remembered and the next state."""
        backbone = self.backbone
        entries[backbone.out_key], state = backbone.core.step(entries[backbone.in_key], self.before(entries))
        self.write(entries, state)

    def before(self, entries: Entries) -> State:
        """What the step goes on from."""
        state = {name: entries[key].to(self.dtype) for name, key in self.backbone.state_keys.items()}
        if self.may_begin:
            state = restart(state, self.initial, entries[self.backbone.is_init_key].squeeze(-1))
        return state

    def write(self, entries: Entries, state: State) -> None:
        """Writes what comes of it."""
        for name, key in self.after.items():
            entries[key] = state[name]


class NetworksStep:
    """The networks of an agent: by one C++ call where `PPOAgent` takes it, else one after the other.

    Args:
        parts: the networks.
        backbone: the step of the backbone among them.
        calls: the networks' own, in order.
    """

    def __init__(self, parts: Parts, backbone: BackboneStep, calls: list[Call]) -> None:
        self.parts, self.backbone, self.calls, self.native_step = parts, backbone, calls, NativeStep()
        self.read = unravel_key(parts.encoder.in_keys[0])
        self.written = [unravel_key(head.out_keys[0]) for head in (parts.policy_head, parts.value_head)]

    def __call__(self, entries: Entries) -> None:
        """Reads the observation and the state; writes what the heads do, and the next state."""
        network = self.native_step.of(self.parts)
        acted = None if network is None else network(entries[self.read], self.backbone.before(entries))
        if acted is None:
            for call in self.calls:
                call(entries)
            return
        entries[self.written[0]], entries[self.written[1]] = acted.policy, acted.value
        self.backbone.write(entries, acted.state)
