"""One step of a backbone on flat entries."""

from __future__ import annotations

import torch
from tensordict.utils import unravel_key

from cyborg_torchrl import keys
from cyborg_torchrl.collectors.flat_dict import FlatDict
from cyborg_torchrl.cores import State, restart
from cyborg_torchrl.modules import Backbone


class BackboneStep:
    """One step of a backbone's core. Restarts cost nothing where no episode begins.

    Args:
        backbone: the wrapper of the core; its keys are read and written.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.backbone, self.may_begin = backbone, True
        self.initial: State = {}
        self.dtype = torch.get_default_dtype()
        self.after = {name: unravel_key((keys.NEXT, key)) for name, key in backbone.state_keys.items()}

    def begin(self, num_envs: int) -> None:
        """Look up the precision and compute the initial state, before a rollout."""
        self.dtype = next((p.dtype for p in self.backbone.core.parameters()), torch.get_default_dtype())
        # A learned initial state changes between rollouts.
        self.initial = self.backbone.core.initial_state(num_envs)

    def __call__(self, entries: FlatDict) -> None:
        """Read the features and the state; write the memory features and the next state."""
        backbone = self.backbone
        entries[backbone.out_key], state = backbone.core.step(entries[backbone.in_key], self.before(entries))
        self.write(entries, state)

    def before(self, entries: FlatDict) -> State:
        """Return the state before the step: the initial state where an episode begins."""
        # States may be stored in another precision than that of the core.
        state = {name: entries[key].to(self.dtype) for name, key in self.backbone.state_keys.items()}
        # Most steps begin no episode; then the restart, which reads every state, is skipped.
        if self.may_begin:
            state = restart(state, self.initial, entries[self.backbone.is_init_key].squeeze(-1))
        return state

    def write(self, entries: FlatDict, state: State) -> None:
        """Write the state after the step."""
        for name, key in self.after.items():
            entries[key] = state[name]
