"""Environments by their names."""

from __future__ import annotations

import pytest

from cyborg_torchrl import make_env


def test_make_env_names_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="unknown environment 'delaid_cue': did you mean 'delayed_cue'"):
        make_env("delaid_cue")
    with pytest.raises(ValueError, match="environment 'n_back' has no option 'horizn': did you mean 'horizon'"):
        make_env("n_back", horizn=3)
    with pytest.raises(ValueError, match="no transform 'previus_action': did you mean 'previous_action'"):
        make_env("n_back", transforms={"previus_action": True})
    with pytest.raises(ValueError, match="frame_stack must be >= 1; got 0"):
        make_env("n_back", transforms={"frame_stack": 0})
    with pytest.raises(ValueError, match="seed must be >= 0; got -1"):
        make_env("n_back", seed=-1)
    env = make_env("n_back", num_envs=3, horizon=4, seed=0, transforms={"previous_action": True})
    assert env.batch_size == (3,)
    assert {"observation", "previous_action", "is_init"} <= set(env.reset().keys())
