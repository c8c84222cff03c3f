"""Connection to a Ray cluster, without its log output."""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import signal
import socket
import threading
from typing import Any

from cyborg_torchrl.registry import UnavailableError

CONNECT_TIMEOUT = 5.0
"""Seconds in which a cluster must answer."""


class ClusterError(ValueError):
    """A cluster that cannot be used; the message is one line with the reason and a cure."""


class RayCluster:
    """A running cluster, or a new local one that ends with this object.

    Ray's logs are in /tmp/ray and not on the terminal. No dashboard is started and no usage is reported. If the program
    is already connected to Ray, it stays connected and `address` has no effect.

    Args:
        address: "auto" for the cluster on this machine, "ip:port" for any cluster; None: a new local one.
        num_workers: number of workers.
        num_cpus: CPUs for each worker, or a share of one; it uses as many threads.
        num_gpus: GPUs for each worker, or a share of one.

    Raises:
        UnavailableError: if Ray is not installed.
        ClusterError: if the cluster does not exist or is too small.
    """

    def __init__(
        self, address: str | None = None, *, num_workers: int, num_cpus: int | float = 1, num_gpus: int | float = 0
    ) -> None:
        if importlib.util.find_spec("ray") is None:
            raise UnavailableError("collecting on Ray needs the package ray: pip install 'cyborg-torchrl[ray]'.")
        # Before the import, which reads the variable.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray

        self.ray = ray
        """The package, connected to the cluster."""
        self._shares = {"num_cpus": num_cpus, "num_gpus": num_gpus}
        self.num_threads = max(1, int(num_cpus))
        """CPU threads of a worker."""
        errors: Any = ray.exceptions
        self.deaths: tuple[type[BaseException], ...] = (
            errors.RayActorError, errors.WorkerCrashedError, errors.NodeDiedError, errors.ObjectLostError,
            errors.OutOfMemoryError,
        )  # fmt: skip
        """Errors raised if the process that computes a result has died."""
        self.faults: tuple[type[BaseException], ...] = (errors.RayError,)
        """All other errors of Ray; catch them after `deaths`."""
        self.is_ours = not ray.is_initialized()
        if self.is_ours:
            self._connect(address, num_workers)
        try:
            self._check_size(num_workers)
        except ClusterError:
            self.shutdown()
            raise

    def share_of_worker(self, *, is_replacement: bool) -> dict[str, Any]:
        """Return the resources of a worker. Replacements request no CPU, so that they start at once."""
        shares = {**self._shares, "num_cpus": 0} if is_replacement else self._shares
        return {**shares, "scheduling_strategy": "SPREAD"}

    def shutdown(self) -> None:
        """Disconnect from the cluster, unless the program was connected before; end a local one."""
        if self.is_ours:
            self.ray.shutdown()
            self.ray._private.worker._worker_logs_enabled = True
        self.is_ours = False

    def _connect(self, address: str | None, num_workers: int) -> None:
        if address:
            _check_reachable(os.environ.get("RAY_ADDRESS", "auto") if address == "auto" else address)
        # Messages about dead workers ignore the log settings and go to stdout. Ray's debugger silences them like this.
        self.ray._private.worker._worker_logs_enabled = False
        local = {"num_cpus": max(1, math.ceil(num_workers * self._shares["num_cpus"])), "include_dashboard": False}
        options = {"address": address} if address else {"address": "local", **local}
        on_sigterm = signal.getsignal(signal.SIGTERM)
        try:
            self.ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
        except (OSError, RuntimeError, ValueError, *self.faults) as error:
            raise _no_cluster(address or "local", error) from None
        finally:
            # Ray replaces the handler of SIGTERM, which only the main thread can set.
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, signal.SIG_DFL if on_sigterm is None else on_sigterm)

    def _check_size(self, num_workers: int) -> None:
        # Ray would wait without a message for resources that the cluster does not have.
        there = self.ray.cluster_resources()
        for name, key in (("CPU", "num_cpus"), ("GPU", "num_gpus")):
            needed, found = num_workers * self._shares[key], there.get(name, 0.0)
            if needed > found:
                raise ClusterError(
                    f"{num_workers} workers with {key}={self._shares[key]:g} each need {needed:g} {name}s; the Ray "
                    f"cluster has {found:g}: use fewer workers, or a smaller share."
                )


def _check_reachable(address: str) -> None:
    """Check quickly that a cluster answers; Ray itself would wait for eight minutes."""
    if address == "auto":
        return
    host, colon, port = address.rpartition(":")
    if not (colon and port.isdigit()) or "/" in host:
        raise ClusterError(f"the address of a Ray cluster is auto or ip:port, as in 10.0.0.1:6379; got '{address}'.")
    try:
        socket.create_connection((host, int(port)), CONNECT_TIMEOUT).close()
    except OSError as error:
        raise _no_cluster(address, error) from None


def _no_cluster(address: str, error: BaseException) -> ClusterError:
    reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
    return ClusterError(
        f"no Ray cluster at '{address}' ({reason}): start one with 'ray start --head', or leave the address out to "
        "start a local one."
    )
