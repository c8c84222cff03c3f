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
from cyborg_torchrl.envs.signals import ignore_interrupts, interrupts_blocked, interrupts_deferred
from cyborg_torchrl.registry import UnavailableError

LOGGER = logging.getLogger(__name__)
MAX_ATTEMPTS = 5
"""How often a process may die on the same request."""
Begun = tuple[Any, dict[str, Any]]
Stepped = tuple[Any, Any, Any, Any, dict[str, Any]]
Spaces = tuple[gymnasium.Space, gymnasium.Space, dict[str, Any]]


class InThisProcess:
    """Environments in this process.

    Args:
        makers: one callable for each environment.

    Raises:
        ValueError: if the environments have different spaces.
    """

    def __init__(self, makers: Sequence[Callable[[], gymnasium.Env]]) -> None:
        self.envs = [make() for make in makers]
        for name in ("observation_space", "action_space"):
            spaces = [getattr(env, name) for env in self.envs]
            if any(space != spaces[0] for space in spaces):
                raise ValueError(f"environments of one batch must have the same {name}; here are several.")

    def spaces(self) -> Spaces:
        """Return the observation space, the action space and the metadata of one environment."""
        return self.envs[0].observation_space, self.envs[0].action_space, dict(self.envs[0].metadata)

    def reset(self, seeds: Mapping[int, int], options: dict[str, Any] | None) -> dict[int, Begun]:
        """Begin an episode in each environment that has a seed."""
        return {i: self.envs[i].reset(seed=seed, options=options) for i, seed in seeds.items()}

    def step(self, actions: Sequence[Any]) -> list[Stepped]:
        """Take a step in each environment."""
        return [env.step(action) for env, action in zip(self.envs, actions, strict=True)]

    def replay(self, episodes: Mapping[int, Episode]) -> dict[int, Any]:
        """Replay episodes, and return their last observations."""
        return {i: played_again(self.envs[i], episode.seed, episode.actions) for i, episode in episodes.items()}

    def close(self) -> None:
        """Close the environments."""
        for env in self.envs:
            env.close()


def played_again(env: gymnasium.Env, seed: int, actions: Sequence[Any]) -> Any:
    """Return the observation after a reset and some actions.

    Return None for environments with the attribute `is_reproducible = False`, which would reach another observation.
    """
    if not getattr(env.unwrapped, "is_reproducible", True):
        return None
    observation, _ = env.reset(seed=seed)
    for action in actions:
        observation = env.step(action)[0]
    return observation


class _Worker(NamedTuple):
    process: Any
    connection: Connection


class EnvironmentProcesses:
    """Environments split over worker processes.

    When a process dies, a new one replaces it and replays the episodes of its environments from their seeds and
    actions. So no step is lost, and none is counted twice. If seed and actions do not determine an environment, it may
    reach another observation. Then its episode is truncated, with the last observation, no reward, and info["error"].

    Args:
        makers: one callable for each environment.
        workers: number of processes; must divide the number of environments.
        episodes: the present episode of each environment; the caller updates them.
    """

    def __init__(self, makers: Sequence[Callable[[], gymnasium.Env]], workers: int, episodes: list[Episode]) -> None:
        self.envs: list[gymnasium.Env] = []  # all environments are in other processes
        self.episodes, self._share = episodes, len(makers) // workers
        self._makers = [
            cloudpickle.dumps(list(makers[w * self._share : (w + 1) * self._share])) for w in range(workers)
        ]
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
        found = [self._ask(w, ("spaces", None)) for w in range(len(self._workers))]
        if any(spaces[:2] != found[0][:2] for spaces in found):
            raise ValueError("environments of one batch must have the same spaces; here are several.")
        return found[0]

    def reset(self, seeds: Mapping[int, int], options: dict[str, Any] | None) -> dict[int, Begun]:
        """Begin an episode in each environment that has a seed."""
        self._lost -= set(seeds)
        requests: dict[int, tuple[str, Any]] = {}
        for w in range(len(self._workers)):
            own = {i % self._share: seed for i, seed in seeds.items() if i // self._share == w}
            if own:
                requests[w] = ("reset", (own, options))
        answers = self._ask_all(requests, begin=frozenset(seeds))
        return {w * self._share + j: begun for w, answer in answers.items() for j, begun in answer.items()}

    def step(self, actions: Sequence[Any]) -> list[Stepped]:
        """Take a step in each environment."""
        split = [actions[w * self._share : (w + 1) * self._share] for w in range(len(self._workers))]
        requests = {w: self._without_lost(w, ("step", dict(enumerate(own)))) for w, own in enumerate(split)}
        answers = self._ask_all(requests)
        steps = [self._step_or_end(w, j, answers[w]) for w in range(len(self._workers)) for j in range(self._share)]
        self._lost.clear()
        return steps

    def replay(self, episodes: Mapping[int, Episode]) -> dict[int, Any]:
        """Replay episodes, and return their last observations."""
        requests = {w: self._again(w, set(episodes)) for w in range(len(self._workers))}
        answers = self._ask_all(requests)
        return {w * self._share + j: seen for w, answer in answers.items() for j, seen in answer.items()}

    def close(self) -> None:
        """End the processes."""
        self._finalizer()

    def _step_or_end(self, worker: int, j: int, answer: dict[int, Stepped]) -> Stepped:
        """Return the step of an environment, or the end of an episode that cannot continue."""
        i = worker * self._share + j
        if i not in self._lost:
            return answer[j]
        error = "the environment's process died, and the episode could not be played again"
        return self.episodes[i].observation, 0.0, False, True, {"error": error}

    def _ask_all(self, requests: Mapping[int, tuple[str, Any]], begin: frozenset[int] = frozenset()) -> dict[int, Any]:
        """Return the answers of several processes, which work at the same time; `begin`: environments under reset."""
        is_sent = {w: self._send(w, request) for w, request in requests.items()}
        return {w: self._ask(w, request, is_sent=is_sent[w], begin=begin) for w, request in requests.items()}

    def _ask(
        self, worker: int, request: tuple[str, Any], *, is_sent: bool | None = None, begin: frozenset[int] = frozenset()
    ) -> Any:
        is_sent = self._send(worker, request) if is_sent is None else is_sent
        for _ in range(MAX_ATTEMPTS):
            answer = self._receive(worker) if is_sent else None
            if answer is not None:
                kind, content = answer
                if kind == "error":
                    raise content
                return content
            is_sent = self._replace(worker, begin) and self._send(worker, self._without_lost(worker, request))
        raise RuntimeError(
            f"the process of environments {self._names(worker)} died {MAX_ATTEMPTS} times over the same request "
            f"('{request[0]}', exit code {self._workers[worker].process.exitcode})."
        )

    def _send(self, worker: int, request: tuple[str, Any]) -> bool:
        try:
            self._workers[worker].connection.send(request)
        except OSError:
            return False
        return True

    def _receive(self, worker: int) -> tuple[str, Any] | None:
        """Return the answer of a process; None if the process is dead."""
        try:
            return self._workers[worker].connection.recv()
        except (EOFError, OSError, pickle.UnpicklingError):
            return None

    def _replace(self, worker: int, begin: frozenset[int]) -> bool:
        """Replace a dead process; return False if the new one died too."""
        old = self._workers[worker]
        old.connection.close()
        old.process.kill()  # it may run on without a connection
        old.process.join()
        own = range(worker * self._share, (worker + 1) * self._share)
        running = {i for i in own if self.episodes[i].has_begun and i not in begin}
        LOGGER.warning(
            "the process of environments %s died (exit code %s): a new one replaces it", self._names(worker),
            old.process.exitcode,
        )  # fmt: skip
        self._workers[worker] = self._started(worker)
        answer = self._receive(worker) if self._send(worker, self._again(worker, running)) else None
        if answer is None:
            return False
        kind, seen = answer
        if kind == "error":
            raise seen
        for i in running:
            observation = seen[i % self._share]
            if observation is None or fingerprint(observation) != self.episodes[i].fingerprint:
                LOGGER.warning("environment %d did not reach the same observation: its episode is truncated", i)
                self._lost.add(i)
        return True

    def _again(self, worker: int, chosen: set[int]) -> tuple[str, Any]:
        own = {i % self._share: self.episodes[i] for i in chosen if i // self._share == worker}
        return "replay", {j: (episode.seed, episode.actions) for j, episode in own.items()}

    def _without_lost(self, worker: int, request: tuple[str, Any]) -> tuple[str, Any]:
        """Return a step request without the environments whose episode could not be replayed."""
        name, content = request
        if name != "step":
            return request
        return name, {j: action for j, action in content.items() if worker * self._share + j not in self._lost}

    def _names(self, worker: int) -> str:
        first = worker * self._share
        return str(first) if self._share == 1 else f"{first} to {first + self._share - 1}"

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
            name, content = connection.recv()
            try:
                here = here or InThisProcess(pickle.loads(makers))
                answer = ("answer", _answer(here, name, content))
            except Exception as error:  # raised again in the requesting process
                answer = ("error", error)
            try:
                connection.send(answer)
            except (pickle.PicklingError, TypeError, AttributeError):
                connection.send(("error", RuntimeError(repr(answer[1]))))
    except (EOFError, OSError):  # the other end has closed
        pass
    finally:
        if here is not None:
            here.close()


def _answer(here: InThisProcess, name: str, content: Any) -> Any:
    if name == "step":
        return {j: here.envs[j].step(action) for j, action in content.items()}
    if name == "reset":
        return here.reset(*content)
    if name == "replay":
        return {j: played_again(here.envs[j], *episode) for j, episode in content.items()}
    return here.spaces()


def _end(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.connection.close()  # a worker ends when its connection closes
    for worker in workers:
        worker.process.join(timeout=2.0)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()
