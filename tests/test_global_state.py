"""The library leaves the process as it is: threads, denormals, allocator, Hydra, signal handlers."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cyborg_torchrl import load_config
from cyborg_torchrl.training.builders import build_trainer

STATE = """
import ctypes
import json
import signal

import torch
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.utils import JobRuntime
from hydra.version import VersionBase

LIBC = ctypes.CDLL(None)


class MallInfo(ctypes.Structure):
    _names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = [(name, ctypes.c_size_t) for name in _names]


def has_default_allocator():
    # by default glibc maps each block of 64 MiB by itself; mallopt(M_MMAP_MAX, 0) puts them on the heap
    if not hasattr(LIBC, "mallinfo2"):
        return None
    LIBC.mallinfo2.restype, LIBC.malloc.restype = MallInfo, ctypes.c_void_p
    before = LIBC.mallinfo2().hblks
    block = LIBC.malloc(ctypes.c_size_t(2**26))
    mapped = LIBC.mallinfo2().hblks - before
    LIBC.free(ctypes.c_void_p(block))
    return mapped == 1


def state():
    return {
        "threads": torch.get_num_threads(),
        "denormals": bool((torch.full((64,), 1e-30) * 1e-10).all()),
        "allocator": has_default_allocator(),
        "hydra": GlobalHydra.instance().hydra,
        "hydra's version": VersionBase.instance().version_base,
        "hydra's job": JobRuntime.instance().get("name"),
        "signal handlers": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "blocked signals": signal.pthread_sigmask(signal.SIG_BLOCK, []),
    }


def own_handler(number, frame):
    pass


# a calling program with settings that nothing in the package would choose
torch.set_num_threads(3)
initialize_config_dir("/", "of the caller", version_base="1.2")
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, own_handler)
"""
COMPARISON = """
after = state()
print(json.dumps([name for name in before if before[name] != after[name]]))
"""
IS_GLIBC = platform.libc_ver()[0] == "glibc"


def changed_by(tmp_path: Path, action: str, imports: str = "") -> list[str]:
    """Run a program. Returns the parts of its state that the action has changed."""
    program = "\n".join([STATE, imports, "before = state()", action, COMPARISON])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert not done.returncode, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_import_leaves_the_process_as_it_is(tmp_path: Path) -> None:
    modules = ("cyborg_torchrl", "cyborg_torchrl.training.builders", "cyborg_torchrl.config", "cyborg_torchrl.envs")
    assert changed_by(tmp_path, f"import {', '.join(modules)}") == []


def test_load_config_leaves_the_process_as_it_is(tmp_path: Path) -> None:
    action = """
load_config(overrides=["backbone=gru"])
assert state() == before
for override in ("backbone=grx", "train.sed=1", "train.seed=-1", "train.seed"):
    try:
        load_config(overrides=[override])
    except ConfigError:
        assert state() == before, override
    else:
        raise AssertionError(override)
"""
    assert changed_by(tmp_path, action, "from cyborg_torchrl.config import ConfigError, load_config") == []


@pytest.mark.parametrize(
    "options",
    [
        "env.num_envs=2 env.horizon=5 train.num_minibatches=1",
        "env=gymnasium env.id=CartPole-v1 env.num_envs=2 env.workers=2 train.n_steps=16 train.num_minibatches=1",
    ],
    ids=["tensors", "processes"],
)
def test_build_trainer_leaves_the_process_as_it_is(tmp_path: Path, options: str) -> None:
    imports = "from cyborg_torchrl import load_config\nfrom cyborg_torchrl.training.builders import build_trainer"
    action = f"""
cfg = load_config(overrides={options.split()!r})
assert cfg.train.num_threads == 1
trainer = build_trainer(cfg).trainer
next(trainer.run())
trainer.close()
"""
    assert changed_by(tmp_path, action, imports) == []


def parameters(seed: int) -> torch.Tensor:
    options = ["env.num_envs=2", "env.horizon=5", "train.num_minibatches=1", f"train.seed={seed}"]
    trainer, agent, _ = build_trainer(load_config(overrides=options))
    trainer.close()
    return torch.cat([parameter.detach().flatten() for parameter in agent.parameters()])


def test_parameters_of_a_trainer_depend_on_its_seed_alone() -> None:
    first = parameters(1)
    torch.rand(3)
    assert torch.equal(first, parameters(1))
    assert not torch.equal(first, parameters(2))


@pytest.mark.skipif(not IS_GLIBC, reason="other allocators are left alone everywhere")
def test_commands_set_threads_denormals_and_allocator(tmp_path: Path) -> None:
    """Commands call `prepare_process`, which changes all three: so the tests above can fail."""
    imports = "from cyborg_torchrl import load_config\nfrom cyborg_torchrl.training.builders import prepare_process"
    action = "prepare_process(load_config())"
    assert changed_by(tmp_path, action, imports) == ["threads", "denormals", "allocator"]


@pytest.mark.skipif(not IS_GLIBC, reason="other allocators are left alone everywhere")
@pytest.mark.parametrize("command", ["train", "sweep"])
def test_a_training_command_sets_them(tmp_path: Path, command: str) -> None:
    options = ["env.num_envs=2", "env.horizon=5", "train.num_minibatches=1", "train.total_timesteps=14"]
    options += ["logger.base_dir=.", "logger.progress=false", "logger.eval_episodes=0"]
    action = f"assert main({[command, *options]!r}) == 0"
    changed = changed_by(tmp_path, action, "from cyborg_torchrl.cli.main import main")
    assert {"threads", "denormals", "allocator"} <= set(changed)
    assert "signal handlers" not in changed
