"""Metric backends in addition to metrics.csv and TensorBoard: Weights & Biases and MLflow, by TorchRL's loggers."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from cyborg_torchrl.config import ConfigError
from cyborg_torchrl.config.composition import flat_options
from cyborg_torchrl.registry import UnavailableError


@dataclass(frozen=True)
class Backend:
    """A run in a backend."""

    logger: Any
    """A logger of TorchRL."""
    run_id: str
    """The backend's name of the run."""
    close: Callable[[], object]
    """Ends the run, after all metrics are sent."""


def start_wandb(cfg: DictConfig, path: Path, run_id: str | None) -> Backend:
    """Start or continue a run at Weights & Biases; its files are in the run's folder."""
    import wandb
    from torchrl.record.loggers import WandbLogger

    logger: Any = WandbLogger(
        path.name,
        save_dir=path,
        id=run_id,
        project=cfg.logger.project,
        log_env_packages=False,
        # Not TorchRL's `offline`, which would stay set for all later runs of the process.
        mode="offline" if cfg.logger.offline else None,
        settings=wandb.Settings(console="off"),  # the progress bar must not be logged
    )
    logger.log_hparams(OmegaConf.to_container(cfg))
    return Backend(logger, logger.experiment.id, logger.experiment.finish)


def start_mlflow(cfg: DictConfig, path: Path, run_id: str | None) -> Backend:
    """Start or continue a run in an MLflow server or database."""
    import mlflow
    from torchrl.record.loggers import MLFlowLogger

    for name in ("mlflow", "alembic"):  # they print the migrations of a new database
        logging.getLogger(name).setLevel(logging.WARNING)
    uri = cfg.logger.tracking_uri or str(path.parent)
    if "://" not in uri:  # current versions of MLflow need a database, not a folder
        Path(uri).mkdir(parents=True, exist_ok=True)
        uri = f"sqlite:///{Path(uri).resolve()}/mlflow.db"
    if run_id is not None:
        os.environ["MLFLOW_RUN_ID"] = run_id  # the start of a run reads this variable and removes it
    logger: Any = MLFlowLogger(cfg.logger.project, uri)
    backend = Backend(logger, logger.experiment.info.run_id, mlflow.end_run)
    if run_id is not None:
        return backend  # the parameters are already logged, and cannot be changed
    mlflow.set_tag("mlflow.runName", path.name)
    logger.log_hparams(flat_options(cfg))
    return backend


KINDS = {"wandb": start_wandb, "mlflow": start_mlflow}


def require_packages(names: Iterable[str]) -> None:
    """Check that the packages of backends are installed.

    Raises:
        UnavailableError: if one is missing.
    """
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # a folder called "wandb" is not the package
            raise UnavailableError(f"logger.backends={name} needs: pip install 'cyborg-torchrl[{name}]'")


class MetricBackends:
    """The backends of a run. A backend that fails later is dropped with a warning; the run continues.

    Args:
        cfg: the configuration, which is logged as hyperparameters. `logger.backends` names the backends.
        path: the run's folder; its name is the name of the run.
        is_resumed: continue the backends' runs of the same folder.

    Raises:
        ConfigError: if a backend cannot be reached.
    """

    def __init__(self, cfg: DictConfig, path: Path, *, is_resumed: bool = False) -> None:
        file = path / "logs" / "backends.json"
        run_ids = json.loads(file.read_text()) if is_resumed and file.exists() else {}
        self._backends: dict[str, Backend] = {}
        for name in cfg.logger.backends:
            try:
                self._backends[name] = KINDS[name](cfg, path, run_ids.get(name))
            except Exception as error:  # each backend and each server raises other exceptions
                self.close()
                hint = "; logger.offline=true needs no server" if name == "wandb" else ""
                raise ConfigError(f"logger.backends: {name} cannot be used ({_in_one_line(error)}){hint}.") from None
        if self._backends:
            run_ids = {name: backend.run_id for name, backend in self._backends.items()}
            file.write_text(json.dumps(run_ids) + "\n")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log metrics at an environment step."""
        for name, backend in list(self._backends.items()):
            try:
                backend.logger.log_metrics(dict(metrics), step)
            except Exception as error:  # training continues, since metrics.csv has all metrics
                warnings.warn(f"{name} takes no more metrics: {_in_one_line(error)}", stacklevel=2)
                del self._backends[name]

    def close(self) -> None:
        """End the run in all backends."""
        for name, backend in self._backends.items():
            try:
                backend.close()
            except Exception as error:
                warnings.warn(f"{name} was not closed: {_in_one_line(error)}", stacklevel=2)


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())
