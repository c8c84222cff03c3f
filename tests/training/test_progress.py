"""The progress bar of a run."""

from __future__ import annotations

from cyborg_torchrl.training.progress import Progress


def test_a_resumed_run_starts_at_its_finished_updates() -> None:
    progress = Progress(is_shown=False)
    with progress.shown(10, 64, finished_updates=3):
        (task,) = progress.bar.tasks
        assert (task.completed, task.total) == (192, 640)
        progress.advance(0.5)
        assert task.completed == 224
    with Progress(is_shown=False).shown(2, 64, finished_updates=3):
        pass  # fewer updates in total than already finished


def test_an_evaluation_counts_at_most_the_requested_episodes() -> None:
    progress = Progress(is_shown=False)
    with progress.shown(1, 64):
        show = progress.evaluation(100)
        show(40, 112)
        _, task = progress.bar.tasks
        assert (task.completed, task.total, task.fields["unit"]) == (40, 100, "episodes")
        show(112, 112)
        assert task.completed == 100
