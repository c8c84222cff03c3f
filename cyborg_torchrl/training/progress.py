"""Progress on stderr: a bar with speed, success and remaining time, and a line for each update."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress


@contextmanager
def progress_bar(title: str, total: int) -> Generator[Callable[..., None]]:
    """Show a bar on stderr, and remove it at the end.

    Yield a function to call with the number of finished items, and with another title if it changes.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with RichProgress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=total)
        yield lambda done, text=title: progress.update(task, completed=done, description=text)


class Progress:
    """The progress of a training run.

    Args:
        is_shown: False: print nothing.
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
    def shown(self, total_updates: int, steps_per_update: int, finished_updates: int = 0) -> Generator[None]:
        """Show the bar within the context."""
        self._steps_per_update, self._updates = steps_per_update, finished_updates
        self.bar.update(self._task, total=max(total_updates, finished_updates) * steps_per_update)
        self.advance(0.0)
        with self.bar:
            yield

    def evaluation(self, number: int) -> Callable[[int, int], None]:
        """Add a bar for an evaluation. Return a function to call with the number of finished episodes."""
        self.console.print(f"evaluating {number:,} episodes")
        task = self.bar.add_task("evaluating", total=number, unit="episodes", figures="")
        return lambda finished, total: self.bar.update(task, completed=min(finished, number))

    def show_evaluation(self, finished: int, total: int) -> None:
        """Show the progress of an evaluation between two updates."""
        self.bar.update(self._task, figures=f"evaluating, {finished:,} of {total:,} episodes")

    def advance(self, share: float) -> None:
        """Set the finished share of the current update, in [0, 1]."""
        self.bar.update(self._task, completed=round((self._updates + share) * self._steps_per_update))

    def report(self, metrics: Mapping[str, float]) -> None:
        """Print the line of a finished update."""
        self._updates = int(metrics["update"])
        name = "success_rate" if "success_rate" in metrics else "mean_reward"
        score = f"{name.split('_')[0]} {metrics.get(name, float('nan')):.3f}"
        figures = f"{metrics['steps_per_second']:,.0f} steps/s  {score}"
        if f"eval/{name}" in metrics:
            figures += f"  eval {metrics[f'eval/{name}']:.3f}"
        if metrics.get("eval/cut_episodes"):
            figures += f" ({metrics['eval/cut_episodes']:,} episodes cut)"
        self.bar.update(self._task, figures=figures)
        self.advance(0.0)
        self.console.print(
            f"update {self._updates:>3}  {metrics['steps']:>10,.0f} steps  {figures}  kl {metrics['kl_approx']:.4f}  "
            f"ratio error {metrics['ratio_error']:.1e}  {metrics['seconds']:.1f} s",
            soft_wrap=True,
        )
