"""Runners of gymnasium environments: in this process, or in worker processes that are replaced when they die."""

from __future__ import annotations

import logging
import multiprocessing
import pickle
import weakref
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import cloudpickle
import gymnasium

from cyborg_torchrl.envs.gym.episode import Episode, fingerprint
from cyborg_torchrl.envs.gym.failures import add_place, portable
from cyborg_torchrl.envs.signals import ignore_interrupts, interrupts_blocked, interrupts_deferred
from cyborg_torchrl.registry import UnavailableError

LOGGER = logging.getLogger(__name__)
MAX_ATTEMPTS = 5
"""How often a process may die on the same request."""
Begun = tuple[Any, dict[str, Any]]
Stepped = tuple[Any, Any, Any, Any, dict[str, Any]]
Spaces = tuple[gymnasium.Space, gymnasium.Space, dict[str, Any]]
Request = tuple[Any, ...]


class InThisProcess:
    """Environments in this process, by their numbers.

    An error that an environment raises gets a note with its number, its seed and its step.

    Args:
        makers: one callable for each environment.

    Raises:
        ValueError: if the environments have different spaces.
    """

    def __init__(self, makers: Mapping[int, Callable[[], gymnasium.Env]]) -> None:
        self.envs = {i: make() for i, make in makers.items()}
        self._seeds: dict[int, int | None] = dict.fromkeys(self.envs)
        self._steps = dict.fromkeys(self.envs, 0)
        self._first, *others = self.envs.values()
        for name in ("observation_space", "action_space"):
            if any(getattr(env, name) != getattr(self._first, name) for env in others):
                raise ValueError(f"environments of one batch must have the same {name}; here are several.")

    def spaces(self) -> Spaces:
        """Return the observation space, the action space and the metadata of one environment."""
        return self._first.observation_space, self._first.action_space, dict(self._first.metadata)

    def reset(self, seeds: Mapping[int, int], options: dict[str, Any] | None) -> dict[int, Begun]:
        """Begin an episode in each environment that has a seed."""
        return {i: self._reset(i, seed, options) for i, seed in seeds.items()}

    def step(self, actions: Mapping[int, Any]) -> dict[int, Stepped]:
        """Take a step in each environment that has an action."""
        return {i: self._step(i, action) for i, action in actions.items()}

    def _reset(self, i: int, seed: int, options: dict[str, Any] | None) -> Begun:
        self._seeds[i], self._steps[i] = seed, 0
        try:
            return self.envs[i].reset(seed=seed, options=options)
        except Exception as error:
            add_place(error, i, seed, 0)
            raise

    def _step(self, i: int, action: Any) -> Stepped:
        self._steps[i] += 1
        try:
            return self.envs[i].step(action)
        except Exception as error:
            add_place(error, i, self._seeds[i], self._steps[i])
            raise

    def replay(self, scripts: Mapping[int, tuple[int, Sequence[Any]]]) -> dict[int, Any]:
        """Reset environments with seeds, take their actions, and return the last observations.

        The observation is None for environments with the attribute `is_reproducible = False`, which would reach another
        one.
        """
        seen: dict[int, Any] = {}
        for i, (seed, actions) in scripts.items():
            env = self.envs[i]
            seen[i] = None
            if getattr(env.unwrapped, "is_reproducible", True):
                seen[i], _ = self._reset(i, seed, None)
                for action in actions:
                    seen[i] = self._step(i, action)[0]
        return seen

    def close(self) -> None:
        """Close the environments."""
        for env in self.envs.values():
            env.close()


class _Worker(NamedTuple):
    process: Any
    connection: Connection


class EnvironmentProcesses:
    """Environments split over worker processes.

    When a process dies, a new one replaces it and replays the episodes of its environments from their seeds and
    actions. So no step is lost, and none is counted twice. If seed and actions do not determine an environment, it may
    reach another observation. Then its episode is truncated, with the last observation, no reward, and info["error"].

    A request is the name of a method of `InThisProcess` and its arguments.

    Args:
        makers: one callable for each environment.
        workers: number of processes; must divide the number of environments.
        episodes: the present episode of each environment; the caller updates them.
    """

    def __init__(self, makers: Sequence[Callable[[], gymnasium.Env]], workers: int, episodes: list[Episode]) -> None:
        self.envs: dict[int, gymnasium.Env] = {}  # all environments are in other processes
        self.episodes, share = episodes, len(makers) // workers
        self._owned = [range(w * share, (w + 1) * share) for w in range(workers)]
        self._makers = [cloudpickle.dumps({i: makers[i] for i in owned}) for owned in self._owned]
        methods = multiprocessing.get_all_start_methods()
        self._context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        if "forkserver" in methods:  # so that a replacement starts at once
            multiprocessing.set_forkserver_preload([__name__])
        self._workers = [self._started(w) for w in range(workers)]
        self._finalizer = weakref.finalize(self, _end, self._workers)
        self._lost: set[int] = set()

    @property
    def pids(self) -> list[int]:
        """The ids of the worker processes."""
        return [worker.process.pid for worker in self._workers]

    def spaces(self) -> Spaces:
        """Return the observation space, the action space and the metadata of one environment."""
        first, *others = self._ask_all(dict.fromkeys(range(len(self._workers)), ("spaces",)))
        if any(spaces[:2] != first[:2] for spaces in others):
            raise ValueError("environments of one batch must have the same spaces; here are several.")
        return first

    def reset(self, seeds: Mapping[int, int], options: dict[str, Any] | None) -> dict[int, Begun]:
        """Begin an episode in each environment that has a seed."""
        self._lost -= set(seeds)
        return self._ask_owners("reset", seeds, options)

    def step(self, actions: Mapping[int, Any]) -> dict[int, Stepped]:
        """Take a step in each environment. An episode that could not be replayed ends."""
        steps = self._ask_owners("step", self._without_lost(actions))
        error = "the environment's process died, and the episode could not be played again"
        for i in self._lost:
            steps[i] = self.episodes[i].observation, 0.0, False, True, {"error": error}
        self._lost.clear()
        return steps

    def replay(self, scripts: Mapping[int, tuple[int, Sequence[Any]]]) -> dict[int, Any]:
        """Replay episodes, and return their last observations (see `InThisProcess.replay`)."""
        return self._ask_owners("replay", scripts)

    def close(self) -> None:
        """End the processes."""
        self._finalizer()

    def _ask_owners(self, name: str, content: Mapping[int, Any], *more: Any) -> dict[int, Any]:
        """Send each process the content for its environments, and return the answers for all environments."""
        requests: dict[int, Request] = {}
        for worker, owned in enumerate(self._owned):
            part = {i: content[i] for i in owned if i in content}
            if part:
                requests[worker] = (name, part, *more)
        answers: dict[int, Any] = {}
        for answer in self._ask_all(requests):
            answers.update(answer)
        return answers

    def _ask_all(self, requests: Mapping[int, Request]) -> list[Any]:
        """Return the answers of several processes, which work at the same time."""
        is_sent = {worker: self._send(worker, request) for worker, request in requests.items()}
        return [self._answer(worker, request, is_sent[worker]) for worker, request in requests.items()]

    def _answer(self, worker: int, request: Request, is_sent: bool) -> Any:
        """Return the answer of a process; replace it and ask again if it dies."""
        for _ in range(MAX_ATTEMPTS):
            answer = self._receive(worker) if is_sent else None
            if answer is not None:
                return answer
            is_sent = self._replace(worker, request)
            if request[0] == "step":  # not in the environments that were lost just now
                request = ("step", self._without_lost(request[1]))
            is_sent = is_sent and self._send(worker, request)
        raise RuntimeError(
            f"the process of environments {self._names(worker)} died {MAX_ATTEMPTS} times over the same request "
            f"('{request[0]}', exit code {self._workers[worker].process.exitcode})."
        )

    def _send(self, worker: int, request: Request) -> bool:
        try:
            self._workers[worker].connection.send(request)
        except OSError:
            return False
        return True

    def _receive(self, worker: int) -> Any:
        """Return the answer of a process, or raise its error; None if the process is dead."""
        try:
            kind, content = self._workers[worker].connection.recv()
        except (EOFError, OSError, pickle.UnpicklingError):
            return None
        if kind == "error":
            raise content
        return content

    def _replace(self, worker: int, request: Request) -> bool:
        """Replace a process that died over a request; return False if the new one died too."""
        old = self._workers[worker]
        old.connection.close()
        old.process.kill()  # it may run on without a connection
        old.process.join()
        LOGGER.warning(
            "the process of environments %s died (exit code %s): a new one replaces it", self._names(worker),
            old.process.exitcode,
        )  # fmt: skip
        self._workers[worker] = self._started(worker)
        begins = request[1] if request[0] == "reset" else ()
        running = [i for i in self._owned[worker] if self.episodes[i].has_begun and i not in begins]
        scripts = {i: self.episodes[i].script for i in running}
        seen = self._receive(worker) if self._send(worker, ("replay", scripts)) else None
        if seen is None:
            return False
        for i in running:
            if seen[i] is None or fingerprint(seen[i]) != self.episodes[i].fingerprint:
                LOGGER.warning("environment %d did not reach the same observation: its episode is truncated", i)
                self._lost.add(i)
        return True

    def _without_lost(self, actions: Mapping[int, Any]) -> dict[int, Any]:
        """Return the actions without those of environments whose episode could not be replayed."""
        return {i: action for i, action in actions.items() if i not in self._lost}

    def _names(self, worker: int) -> str:
        owned = self._owned[worker]
        return str(owned[0]) if len(owned) == 1 else f"{owned[0]} to {owned[-1]}"

    def _started(self, worker: int) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs, self._makers[worker]), daemon=True)
        try:
            with interrupts_deferred():  # an interrupted start leaves a process with half its input
                resource_tracker.ensure_running()  # first, since starting it unblocks signals
                with interrupts_blocked():
                    process.start()
        except (OSError, EOFError) as error:  # EOFError: the fork server was killed
            help_ = ": TMPDIR is too long for a socket" if "AF_UNIX" in str(error) else ""
            raise UnavailableError(f"cannot start a process for environments ({error}){help_}.") from None
        theirs.close()
        return _Worker(process, ours)


def _serve(connection: Connection, makers: bytes) -> None:
    """Serve requests in a worker process until the connection closes."""
    ignore_interrupts()
    here: InThisProcess | None = None
    try:
        while True:
            name, *arguments = connection.recv()
            try:
                here = here or InThisProcess(pickle.loads(makers))
                answer = ("answer", getattr(here, name)(*arguments))
            except Exception as error:  # raised again in the requesting process
                answer = ("error", portable(error))
            try:
                connection.send(answer)
            except (pickle.PicklingError, TypeError, AttributeError):
                connection.send(("error", RuntimeError(repr(answer[1]))))
    except (EOFError, OSError):  # the other end has closed
        pass
    finally:
        if here is not None:
            here.close()


def _end(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.connection.close()  # a worker ends when its connection closes
    for worker in workers:
        worker.process.join(timeout=2.0)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()
