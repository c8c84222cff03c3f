"""A Ray cluster, quietly."""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import signal
import socket
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

from cyborg_torchrl.registry import UnavailableError

KNOCKING = 5.0
"""Seconds in which a cluster has to answer."""


class ClusterError(ValueError):
    """A cluster that cannot be used; the message is one line that says why and what would be right."""


class RayCluster:
    """A cluster that is there already, or one of its own on this machine that ends with it.

    Nothing that Ray logs comes to the terminal (it is in /tmp/ray), no dashboard is started, no usage is reported.
    A program that is connected to Ray already stays so, and `address` has no effect.

    Args:
        address: "auto" for the cluster that runs on this machine, "ip:port" for any; None: one of its own.
        num_workers: how many workers there will be.
        num_cpus: CPUs that each of them asks for, or a share of one; it computes with as many threads.
        num_gpus: GPUs that each of them asks for, or a share of one.

    Raises:
        UnavailableError: if Ray is not installed.
        ClusterError: if there is no such cluster, or it is too small.
    """

    def __init__(
        self, address: str | None = None, *, num_workers: int, num_cpus: int | float = 1, num_gpus: int | float = 0
    ) -> None:
        if importlib.util.find_spec("ray") is None:
            raise UnavailableError("collecting on Ray needs the package ray: pip install 'cyborg-torchrl[ray]'.")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray

        self._ray = ray
        self._shares = {"num_cpus": num_cpus, "num_gpus": num_gpus}
        self.num_threads = max(1, int(num_cpus))
        """CPU threads that a worker may use."""
        errors: Any = ray.exceptions
        self.deaths: tuple[type[BaseException], ...] = (
            errors.RayActorError, errors.WorkerCrashedError, errors.NodeDiedError, errors.ObjectLostError,
            errors.OutOfMemoryError,
        )  # fmt: skip
        """What is raised in place of a result when who was to give it is gone."""
        self.faults: tuple[type[BaseException], ...] = (errors.RayError,)
        """What is raised when anything else went wrong; caught after `deaths`."""
        self.is_ours = not ray.is_initialized()
        if self.is_ours:
            self._connect(address, num_workers)
        try:
            self._check_size(num_workers)
        except ClusterError:
            self.shutdown()
            raise

    def actor_class(self, plain: type) -> Any:
        """The class whose objects live on the cluster, each in a process of its own."""
        return self._ray.remote(plain)

    def share_of_worker(self, *, is_replacement: bool) -> dict[str, Any]:
        """Options of a worker: what it asks for. Replacements ask for no CPU, so that they find a place at once."""
        shares = {**self._shares, "num_cpus": 0} if is_replacement else self._shares
        return {**shares, "scheduling_strategy": "SPREAD"}

    def put(self, content: Any) -> Any:
        """Gives the cluster an object. Returns a reference to it, which actors get as the object itself."""
        return self._ray.put(content)

    def get(self, reference: Any) -> Any:
        """The object, or list of objects, of a reference, or of a list of them.

        Raises:
            One of `deaths` or `faults`.
        """
        return self._ray.get(reference)

    def first_done(self, references: Sequence[Any], seconds: float) -> Any:
        """The first of the references behind which there is something, or an error; None if there is none in time."""
        done, _ = self._ray.wait(list(references), timeout=seconds)
        return done[0] if done else None

    def wait_for_all(self, references: Sequence[Any], seconds: float) -> None:
        """Waits until there is something behind all of the references, or time is up."""
        self._ray.wait(list(references), num_returns=len(references), timeout=seconds)

    def end(self, actor: Any) -> None:
        """Ends an actor's process, whatever it is at."""
        self._ray.kill(actor)

    def shutdown(self) -> None:
        """Leaves the cluster, if it was not joined before; one that was started here ends. Nothing more is asked."""
        if self.is_ours:
            self._ray.shutdown()
            self._ray._private.worker._worker_logs_enabled = True
        self.is_ours = False

    def _connect(self, address: str | None, num_workers: int) -> None:
        if address:
            _check_reachable(os.environ.get("RAY_ADDRESS", "auto") if address == "auto" else address)
        # what nodes say of dead workers would go to stdout, whatever is logged: Ray's debugger silences it like this
        self._ray._private.worker._worker_logs_enabled = False
        local = {"num_cpus": max(1, math.ceil(num_workers * self._shares["num_cpus"])), "include_dashboard": False}
        try:
            with _sigterm_kept():
                self._ray.init(
                    address=address or "local",
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    **({} if address else local),
                )
        except (OSError, RuntimeError, ValueError, *self.faults) as error:
            raise _no_cluster(address or "local", error) from None

    def _check_size(self, num_workers: int) -> None:
        there = self._ray.cluster_resources()
        for name, key in (("CPU", "num_cpus"), ("GPU", "num_gpus")):
            needed, found = num_workers * self._shares[key], there.get(name, 0.0)
            if needed > found:
                raise ClusterError(
                    f"{num_workers} workers with {key}={self._shares[key]:g} each need {needed:g} {name}s; the Ray "
                    f"cluster has {found:g}: use fewer workers, or a smaller share."
                )


def _check_reachable(address: str) -> None:
    """Ray itself knocks for eight minutes."""
    if address == "auto":
        return
    host, colon, port = address.rpartition(":")
    if not (colon and port.isdigit()) or "/" in host:
        raise ClusterError(f"the address of a Ray cluster is auto or ip:port, as in 10.0.0.1:6379; got '{address}'.")
    try:
        socket.create_connection((host, int(port)), KNOCKING).close()
    except OSError as error:
        raise _no_cluster(address, error) from None


def _no_cluster(address: str, error: BaseException) -> ClusterError:
    said = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
    return ClusterError(
        f"no Ray cluster at '{address}' ({said}): start one with 'ray start --head', or leave the address out for one "
        "of this run's own."
    )


@contextmanager
def _sigterm_kept() -> Generator[None]:
    """Ray puts its own handler of SIGTERM in the place of the one that is there."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
