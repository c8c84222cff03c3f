"""Progress of a run on stderr: a bar with steps/s, success and time left, and a line for each update."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress


@contextmanager
def progress_bar(what: str, total: int) -> Generator[Callable[[int], None]]:
    """A bar on stderr, gone when it is over; what is yielded is called with how much is done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with RichProgress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.update(task, completed=done)


class Progress:
    """Shows how far training is.

    Args:
        is_shown: show anything at all.
    """

    def __init__(self, is_shown: bool = True) -> None:
        self.console = Console(stderr=True, quiet=not is_shown, highlight=False)
        self.bar = RichProgress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}  {task.fields[figures]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not is_shown,
        )
        self._task = self.bar.add_task("training", total=None, unit="steps", figures="")
        self._steps_per_update = 0
        self._updates = 0

    @contextmanager
    def over(self, total_updates: int, steps_per_update: int, done_updates: int = 0) -> Generator[None]:
        """Shows the bar while the context lasts."""
        self._steps_per_update, self._updates = steps_per_update, done_updates
        self.bar.update(self._task, total=max(total_updates, done_updates) * steps_per_update)
        self.advance(0.0)
        with self.bar:
            yield

    def over_episodes(self, number: int) -> Callable[[int, int], None]:
        """Says that the agent is evaluated; what is returned is called with how many episodes are over."""
        self.console.print(f"evaluating {number:,} episodes")
        task = self.bar.add_task("evaluating", total=number, unit="episodes", figures="")
        return lambda finished, total: self.bar.update(task, completed=min(finished, number))

    def advance(self, share: float) -> None:
        """Sets the share of the present update that is done, in [0, 1]."""
        self.bar.update(self._task, completed=round((self._updates + share) * self._steps_per_update))

    def report(self, metrics: Mapping[str, float]) -> None:
        """Ends an update: prints its line."""
        self._updates = int(metrics["update"])
        score = "success_rate" if "success_rate" in metrics else "mean_reward"
        figures = (
            f"{metrics['steps_per_second']:,.0f} steps/s  {score.split('_')[0]} {metrics.get(score, float('nan')):.3f}"
        )
        self.bar.update(self._task, figures=figures)
        self.advance(0.0)
        self.console.print(
            f"update {self._updates:>3}  {metrics['steps']:>10,.0f} steps  {figures}  kl {metrics['kl_approx']:.4f}  "
            f"ratio error {metrics['ratio_error']:.1e}  {metrics['seconds']:.1f} s",
            soft_wrap=True,
        )
