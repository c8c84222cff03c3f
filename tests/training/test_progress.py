"""The bar of a run."""

from __future__ import annotations

from cyborg_torchrl.training.progress import Progress


def test_a_run_that_goes_on_begins_where_it_was() -> None:
    progress = Progress(is_shown=False)
    with progress.over(10, 64, done_updates=3):
        (task,) = progress.bar.tasks
        assert (task.completed, task.total) == (192, 640)
        progress.advance(0.5)
        assert task.completed == 224
    with Progress(is_shown=False).over(2, 64, done_updates=3):
        pass  # ended with less than it had done


def test_an_evaluation_counts_episodes_and_not_more_than_were_asked_for() -> None:
    progress = Progress(is_shown=False)
    with progress.over(1, 64):
        show = progress.over_episodes(100)
        show(40, 112)
        _, task = progress.bar.tasks
        assert (task.completed, task.total, task.fields["unit"]) == (40, 100, "episodes")
        show(112, 112)
        assert task.completed == 100
