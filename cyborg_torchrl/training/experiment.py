"""One training run, from a configuration to a summary."""

from __future__ import annotations

import os
import resource
import signal
import stat
import sys
import threading
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from cyborg_torchrl.collectors.ray_collector import WorkerError
from cyborg_torchrl.config import ConfigError
from cyborg_torchrl.config.presets import describe_preset
from cyborg_torchrl.envs.make import episode_attribute
from cyborg_torchrl.envs.signals import TERMINATIONS
from cyborg_torchrl.modules.encoders.autocast import is_emulated
from cyborg_torchrl.modules.nan_check import NonFiniteError
from cyborg_torchrl.registry import environments
from cyborg_torchrl.training.builders import Training, build_trainer
from cyborg_torchrl.training.checkpoint import DUMP, save_checkpoint
from cyborg_torchrl.training.distributed import PeerLostError, Ranks, joined_ranks
from cyborg_torchrl.training.evaluation import Evaluation
from cyborg_torchrl.training.init_from import Source, find_source, load_source, with_trained_memory
from cyborg_torchrl.training.overview import overview, overview_lines
from cyborg_torchrl.training.profile import profiled
from cyborg_torchrl.training.progress import Progress
from cyborg_torchrl.training.resume import ResumePoint, find_run, restore_training, training_state
from cyborg_torchrl.training.run_evaluation import (
    evaluate_agent,
    evaluate_update,
    evaluation_metrics,
    is_evaluated,
    score_prefix,
)
from cyborg_torchrl.training.run_folder import RunFolder, default_run_name

SLOW_AUTOCAST = (
    "this CPU has no instructions for {0}, so encoder.autocast={0} is slower than float32: use encoder.autocast=null"
)


class StoppedError(RuntimeError):
    """A run that cannot continue; the message is one line with the reason, and what to do."""


@dataclass
class Experiment:
    """The parts of one run, and its results so far."""

    cfg: DictConfig
    training: Training
    path: Path
    """The run's folder."""
    run: RunFolder | None
    """Writes the folder; None in all ranks but the first."""
    progress: Progress
    horizon: int | None
    started: float
    """Value of `time.perf_counter` at the start."""
    seconds_before: float
    """Seconds of the run before it was resumed."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Metrics of the last update; {} before the first."""
    has_success: bool = False
    """An update has reported success, by which checkpoints are compared from then on; before that by their return."""
    eval_seconds: float = 0.0
    """Seconds of all evaluations between updates."""
    evaluation: Evaluation | None = None
    is_stopped: bool = False
    """`train.stop_at` was reached before the last update."""
    is_interrupted: bool = False


def run_experiment(cfg: DictConfig) -> dict[str, Any]:
    """Train and evaluate an agent, and write the run's folder.

    Ctrl-C, SIGTERM and SIGHUP end training early; the summary then has `is_interrupted`. `resume=auto` continues from
    the last finished update with the same results as an uninterrupted run. Before training, while the parts are built,
    Ctrl-C raises KeyboardInterrupt. The processes of a launcher train together; the first evaluates and writes.

    Args:
        cfg: a checked configuration, from `load_config`.

    Returns:
        The summary, which is also written as `summary.json`.

    Raises:
        ConfigError: if the parts cannot be built, or another run has the folder.
        CheckpointError: if the run to resume cannot be read.
        StoppedError: if the run cannot continue: a full disk, a number that is not finite, or workers that die again
            and again.
    """
    with terminations_as_interrupt(), joined_ranks(cfg.train.device) as ranks:
        return _run(cfg, ranks)


def _run(cfg: DictConfig, ranks: Ranks) -> dict[str, Any]:
    started = time.perf_counter()
    progress = Progress(is_shown=cfg.logger.progress and ranks.is_first)
    point = ranks.from_first(lambda: find_run(cfg))
    if point is not None and point.is_finished(cfg):
        progress.console.print(f"{point.folder} is done already.")
        return {**(point.summary or {}), "run_dir": str(point.folder)}
    point = point or ResumePoint()
    source = ranks.from_first(lambda: find_source(cfg, point))
    cfg = with_trained_memory(cfg, source, point)
    experiment = _prepare(cfg, ranks, point, source, progress, started)
    trainer = experiment.training.trainer
    try:
        with progress.shown(trainer.total_updates, trainer.steps_per_update, trainer.num_updates):
            _train(experiment)
            if cfg.logger.eval_episodes and experiment.run is not None:
                _evaluate(experiment, experiment.run)
    except NonFiniteError as error:
        raise _dump(experiment, error) from None
    except WorkerError as error:
        raise StoppedError(f"{error} resume={experiment.path} goes on from the last checkpoint") from None
    except (KeyboardInterrupt, PeerLostError) as error:
        experiment.is_interrupted = True
        _report_interrupt(experiment, error)
    finally:
        trainer.close()
        if experiment.run is not None:
            experiment.run.close()
    summary = _summarise(experiment)
    if experiment.run is not None:
        with _disk_errors(experiment):
            experiment.run.write_json("summary.json", summary)
    return summary


def _prepare(
    cfg: DictConfig, ranks: Ranks, point: ResumePoint, source: Source | None, progress: Progress, started: float
) -> Experiment:
    """Build the parts of a run, restore them or load what another run has learned, and open its folder."""
    training = build_trainer(cfg, progress.advance, ranks)
    progress.console.print(describe_preset(cfg, training.env), highlight=False)
    horizon = episode_attribute(training.env, "horizon")  # not available after the environment is closed
    try:
        if point.checkpoint is not None:
            warnings = restore_training(training, point.content, point.checkpoint, cfg.train.seed)
            done = f"{training.trainer.num_updates} updates, {training.trainer.num_steps:,} steps"
            progress.console.print(f"resuming {point.checkpoint} ({done})", highlight=False)
            for warning in warnings if ranks.is_first else []:
                print(f"warning: {warning}", file=sys.stderr)
        elif source is not None:
            progress.console.print(load_source(training, cfg, source), highlight=False)
        if ranks.is_first and is_emulated(cfg.encoder.autocast, training.trainer.device):
            print(f"warning: {SLOW_AUTOCAST.format(cfg.encoder.autocast)}", file=sys.stderr)
        path = ranks.from_first(lambda: point.folder or _new_folder(cfg))
        about = overview(training.agent)
        for line in overview_lines(about):
            progress.console.print(line, soft_wrap=True)
        if source is not None:
            about["init_from"] = source.record()
        run = _open_run(path, cfg, point, training.trainer.num_updates, about) if ranks.is_first else None
    except BaseException:
        training.trainer.close()
        raise
    seconds_before = float(point.content.get("seconds", 0.0))
    experiment = Experiment(cfg, training, path, run, progress, horizon, started, seconds_before)
    experiment.has_success = point.content.get("has_success", False)
    experiment.is_stopped = point.has_stopped_early(cfg)
    return experiment


def _new_folder(cfg: DictConfig) -> Path:
    return Path(cfg.logger.base_dir) / (cfg.logger.run_name or default_run_name(cfg))


def _open_run(path: Path, cfg: DictConfig, point: ResumePoint, num_updates: int, about: Mapping[str, Any]) -> RunFolder:
    try:
        run = RunFolder(path, cfg, None if point.folder is None else num_updates, about)
    except OSError as error:
        raise ConfigError(f"logger.base_dir: cannot write to '{path}' ({error.strerror}).") from None
    logger = point.content.get("config", {}).get("logger", {})
    if bool(logger.get("eval_every")) == bool(cfg.logger.eval_every):  # scores of training and evaluation differ
        run.checkpoints.best = point.content.get("best")
    return run


def _train(experiment: Experiment) -> None:
    """Train to the end, or until the score reaches `train.stop_at`; log every update and write its checkpoint."""
    trainer, stop_at = experiment.training.trainer, experiment.cfg.train.stop_at
    if experiment.is_stopped:
        return
    steps_before = trainer.num_steps
    is_profiled = experiment.cfg.logger.profile and experiment.run is not None
    updates = trainer.total_updates - trainer.num_updates
    with profiled(experiment.path / "profile", updates) if is_profiled else nullcontext(_do_nothing) as after_update:
        for metrics in trainer.run():
            seconds = time.perf_counter() - experiment.started
            metrics |= {"update": trainer.num_updates, "steps": trainer.num_steps}
            metrics["seconds"] = experiment.seconds_before + seconds
            metrics["steps_per_second"] = (trainer.num_steps - steps_before) / (seconds - experiment.eval_seconds)
            metrics |= {f"seconds_{name}": value for name, value in trainer.seconds.items()}
            experiment.metrics = metrics
            if is_evaluated(experiment.cfg, trainer.num_updates, trainer.total_updates):
                _evaluate_update(experiment)
            score = _score(experiment)
            has_reached = stop_at is not None and score is not None and score >= stop_at
            experiment.is_stopped = has_reached and trainer.num_updates < trainer.total_updates
            _log_update(experiment, score)
            experiment.progress.report(metrics)
            after_update()
            if experiment.is_stopped:
                experiment.progress.console.print(f"stopped early: the score {score:.3f} has reached train.stop_at")
                return


def _do_nothing() -> None:
    """Take the place of a profiler."""


def _score(experiment: Experiment) -> float | None:
    """Return the score of the update: its success from the first report of success on, and its return before."""
    prefix = score_prefix(experiment.cfg)
    if f"{prefix}success_rate" in experiment.metrics and not experiment.has_success:
        experiment.has_success = True
        if experiment.run is not None:
            experiment.run.checkpoints.best = None  # returns and successes cannot be compared
    return experiment.metrics.get(f"{prefix}{'success_rate' if experiment.has_success else 'mean_reward'}")


def _evaluate_update(experiment: Experiment) -> None:
    """Add the evaluation of an update to its metrics. The first rank evaluates, and the others wait for its result."""
    trainer, agent, _ = experiment.training
    show = experiment.progress.show_evaluation
    metrics = trainer.ranks.from_first(lambda: evaluate_update(experiment.cfg, agent, trainer.num_updates, show))
    experiment.eval_seconds += metrics["eval/seconds"]
    experiment.metrics |= metrics


def _log_update(experiment: Experiment, score: float | None) -> None:
    """Log an update, and write its checkpoint if it is due, was evaluated, or is the run's last one."""
    trainer, metrics, run = experiment.training.trainer, experiment.metrics, experiment.run
    started = time.perf_counter()
    is_saved = trainer.num_updates == trainer.total_updates or experiment.is_stopped or "eval/seconds" in metrics
    is_saved |= trainer.num_updates % experiment.cfg.logger.checkpoint_every == 0
    state = training_state(experiment.training) if is_saved else {}  # all ranks send theirs to the first
    if run is None:
        return
    with _disk_errors(experiment):
        if is_saved:
            more = {"seconds": metrics["seconds"], "has_success": experiment.has_success}
            run.save({**state, **more, "stopped_early": experiment.is_stopped}, trainer.num_updates, score)
        metrics["seconds_checkpoint"] = time.perf_counter() - started
        run.log(metrics)


def _evaluate(experiment: Experiment, run: RunFolder) -> None:
    """Evaluate the trained agent on fresh episodes, and log the result."""
    options = experiment.cfg.logger
    result = evaluate_agent(
        experiment.cfg,
        experiment.training.agent,
        options.eval_episodes,
        is_deterministic=options.eval_actions == "greedy",
        on_episodes=experiment.progress.evaluation(options.eval_episodes),
    )
    experiment.evaluation = result
    if result.num_cut:
        print(f"warning: {result.cut_note}", file=sys.stderr)
    with _disk_errors(experiment):
        run.log_evaluation(evaluation_metrics(result), experiment.training.trainer.num_steps)


def _summarise(experiment: Experiment) -> dict[str, Any]:
    """Return the summary. Without an evaluation, success and reward are those of the last rollout."""
    cfg, metrics, evaluation = experiment.cfg, experiment.metrics, experiment.evaluation
    trainer = experiment.training.trainer
    seconds = experiment.seconds_before + time.perf_counter() - experiment.started
    return {
        "task": environments.title(cfg.env.name, cfg.env),
        "id": cfg.env.get("id"),
        "backbone": cfg.backbone.name,
        "memory": cfg.memory.name,
        "horizon": experiment.horizon,
        "recurrent_mode": cfg.train.recurrent_mode,
        "num_envs": cfg.env.get("num_envs"),
        "total_timesteps": trainer.num_steps,
        "seed": cfg.train.seed,
        "init_from": cfg.init_from.path,
        "success_rate": evaluation.success_rate if evaluation else metrics.get("success_rate"),
        "mean_reward": evaluation.mean_reward if evaluation else metrics.get("mean_reward"),
        "mmer": trainer.epoch_returns.mmer,
        "eval_actions": cfg.logger.eval_actions if evaluation else None,
        "eval_episodes": evaluation.episodes if evaluation else 0,
        "eval_cut_episodes": evaluation.num_cut if evaluation else 0,
        "train_success_rate": metrics.get("success_rate"),
        "steps_per_second": round(metrics["steps_per_second"], 1) if metrics else None,
        "total_updates": trainer.num_updates,
        "total_seconds": round(seconds, 2),
        "peak_rss_mb": round(peak_rss_mb(), 1),
        "is_interrupted": experiment.is_interrupted,
        "stopped_early": experiment.is_stopped,
        "processes": trainer.ranks.size,
        "run_dir": str(experiment.path),
    }


def _dump(experiment: Experiment, error: NonFiniteError) -> StoppedError:
    """Write a dump of a number that is not finite. Return the error that ends the run; checkpoints are unchanged."""
    trainer, agent, _ = experiment.training
    update = trainer.num_updates + 1
    content = {
        "config": OmegaConf.to_container(experiment.cfg),
        "agent": agent.state_dict(),
        "update": update,
        "num_steps": trainer.num_steps,
        "message": str(error),
        **error.record,
    }
    path = experiment.path / "dumps" / f"update_{update:08d}.pt"
    save_checkpoint(path, content, kind=DUMP)
    return StoppedError(
        f"{error} (update {update}, after {trainer.num_steps:,} steps). What led to it: "
        f"cyborg-torchrl replay {path}; {_last_checkpoint(experiment)}"
    )


def _last_checkpoint(experiment: Experiment) -> str:
    last = experiment.path / "checkpoints" / "last.pt"
    return f"the last good checkpoint is {last}" if last.exists() else "there is no checkpoint yet"


@contextmanager
def _disk_errors(experiment: Experiment) -> Generator[None]:
    """Raise StoppedError for a full disk, or any other error of writing."""
    try:
        yield
    except OSError as error:
        raise StoppedError(
            f"cannot write to '{experiment.path}' ({error.strerror or error}) after update "
            f"{experiment.training.trainer.num_updates}; {_last_checkpoint(experiment)}. Make room and go on with "
            f"resume={experiment.path}"
        ) from None


def _report_interrupt(experiment: Experiment, error: BaseException) -> None:
    ranks = experiment.training.trainer.ranks
    if ranks.size > 1 and threading.current_thread() is threading.main_thread():
        # A launcher forwards the interrupt that all processes have already received.
        for number in (signal.SIGINT, *TERMINATIONS):
            signal.signal(number, signal.SIG_IGN)
    if ranks.is_first:
        path = experiment.path
        has_checkpoint = (path / "checkpoints" / "last.pt").exists()
        then = "goes on from the last checkpoint" if has_checkpoint else "begins again: there is no checkpoint yet"
        print(f"{str(error) or 'interrupted'}; resume={path} {then}", file=sys.stderr)


def peak_rss_mb() -> float:
    """Return the largest resident memory of this process so far, in MiB."""
    with suppress(OSError, IndexError, ValueError):  # Linux; its getrusage includes memory of the parent process
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024**2 if sys.platform == "darwin" else 1024)


@contextmanager
def terminations_as_interrupt() -> Generator[None]:
    """Handle SIGTERM and SIGHUP as Ctrl-C. Under nohup, SIGHUP stays ignored."""

    def interrupt(signum: int, frame: Any) -> None:
        if signum != signal.SIGTERM:
            _leave_terminal()
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # the calling program handles signals
        yield
        return
    handled = [number for number in TERMINATIONS if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, interrupt) for number in handled}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _leave_terminal() -> None:
    """Discard the output to a closed terminal, which would be an error."""
    null_device = os.open(os.devnull, os.O_RDWR)
    for stream in (1, 2):
        if stat.S_ISCHR(os.fstat(stream).st_mode):  # isatty is False for a closed terminal
            os.dup2(null_device, stream)
    os.close(null_device)
