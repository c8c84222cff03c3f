"""Where metrics go besides metrics.csv and TensorBoard: Weights & Biases and MLflow, through TorchRL's loggers."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from omegaconf import DictConfig, OmegaConf
from torchrl.record.loggers import MLFlowLogger, WandbLogger
from torchrl.record.loggers.common import Logger

from cyborg_torchrl.config import BACKENDS, ConfigError
from cyborg_torchrl.registry import UnavailableError

MOST_PARAMETERS = 100
"""What MLflow takes at once."""


class Backend(Protocol):
    """What takes the metrics of one run."""

    logger: Logger
    run_id: str
    """What it knows the run by."""

    def close(self) -> None:
        """Ends the run there."""
        ...


class Wandb:
    """A run at Weights & Biases; files are kept in the run's folder."""

    def __init__(self, cfg: DictConfig, path: Path, run_id: str | None) -> None:
        import wandb

        # not TorchRL's `offline`, which would stay set for all later runs of the process
        mode = "offline" if cfg.logger.offline else None
        settings = wandb.Settings(console="off")  # a progress bar is no log
        self.logger: Logger = WandbLogger(
            path.name,
            save_dir=path,
            id=run_id,
            project=cfg.logger.project,
            log_env_packages=False,
            mode=mode,
            settings=settings,
        )
        self.run_id = self.logger.experiment.id
        self.logger.log_hparams(_configuration(cfg))

    def close(self) -> None:
        """Ends the run, and waits until what is to be sent was sent."""
        self.logger.experiment.finish()


class MLflow:
    """A run of an MLflow server or database."""

    def __init__(self, cfg: DictConfig, path: Path, run_id: str | None) -> None:
        import mlflow

        for name in ("mlflow", "alembic"):  # migrations of a new database are news to nobody
            logging.getLogger(name).setLevel(logging.WARNING)
        uri = cfg.logger.tracking_uri or str(path.parent)
        if "://" not in uri:  # MLflow keeps nothing in plain folders any more
            Path(uri).mkdir(parents=True, exist_ok=True)
            uri = f"sqlite:///{Path(uri).resolve()}/mlflow.db"
        if run_id is not None:
            os.environ["MLFLOW_RUN_ID"] = run_id  # which the start of a run takes, and takes away
        self.logger: Logger = MLFlowLogger(cfg.logger.project, uri)
        self.run_id = self.logger.experiment.info.run_id
        if run_id is not None:
            return  # its parameters are there, and cannot be changed
        mlflow.set_tag("mlflow.runName", path.name)
        parameters = list(_flat(_configuration(cfg)).items())
        for begin in range(0, len(parameters), MOST_PARAMETERS):
            self.logger.log_hparams(dict(parameters[begin : begin + MOST_PARAMETERS]))

    def close(self) -> None:
        """Ends the run."""
        import mlflow

        mlflow.end_run()


KINDS: dict[str, Callable[[DictConfig, Path, str | None], Backend]] = dict(zip(BACKENDS, (Wandb, MLflow), strict=True))


def require_packages(names: Iterable[str]) -> None:
    """Checks that the backends can be imported.

    Raises:
        UnavailableError: if one cannot.
    """
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # a folder called "wandb" is no package
            raise UnavailableError(f"logger.backends={name} needs: pip install 'cyborg-torchrl[{name}]'")


class MetricBackends:
    """The backends of a run. What one of them cannot take stops that one, not the run.

    Args:
        cfg: the configuration; `logger.backends` names them, and all of it is logged as hyperparameters.
        path: the run's folder; its name is the run's.
        is_resumed: go on with the runs that the backends began before.

    Raises:
        ConfigError: if a backend cannot be reached.
    """

    def __init__(self, cfg: DictConfig, path: Path, *, is_resumed: bool = False) -> None:
        known = path / "logs" / "backends.json"
        before = json.loads(known.read_text()) if is_resumed and known.exists() else {}
        self._backends: dict[str, Backend] = {}
        for name in cfg.logger.backends:
            try:
                self._backends[name] = KINDS[name](cfg, path, before.get(name))
            except Exception as error:  # each has exceptions of its own, and so have their servers
                self.close()
                text = " ".join(str(error).split())
                hint = "; logger.offline=true needs no server" if name == "wandb" else ""
                raise ConfigError(f"logger.backends: {name} cannot be used ({text}){hint}.") from None
        if self._backends:
            known.write_text(json.dumps({name: backend.run_id for name, backend in self._backends.items()}) + "\n")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Logs metrics at an environment step."""
        for name, backend in list(self._backends.items()):
            try:
                backend.logger.log_metrics(dict(metrics), step)
            except Exception as error:  # training goes on, and metrics.csv holds everything
                warnings.warn(f"{name} takes no more metrics: {' '.join(str(error).split())}", stacklevel=2)
                del self._backends[name]

    def close(self) -> None:
        """Ends the run everywhere."""
        for name, backend in self._backends.items():
            try:
                backend.close()
            except Exception as error:
                warnings.warn(f"{name} was not closed: {' '.join(str(error).split())}", stacklevel=2)


def _configuration(cfg: DictConfig) -> dict[str, Any]:
    return OmegaConf.to_container(cfg, resolve=True)


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return flat
