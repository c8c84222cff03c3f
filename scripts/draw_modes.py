"""Draw the steps that each recurrent mode stores, replays and trains: scripts/draw_modes.py docs/modes.png.

The strips are computed by the functions of the buffers.
"""

from __future__ import annotations

import sys

import torch
from matplotlib import pyplot
from matplotlib.patches import Patch, Rectangle

from cyborg_torchrl.data.chunks import pack_episodes, window_starts, windows

STEPS = 24
EPISODES = (0, 9, 20)
"""First steps of the episodes; the first episode continues from the rollout before."""
TRAINED, REPLAYED, PADDING = "#4c78a8", "#f2cf7a", "#dddddd"


def strip(axes, y: float, steps: list[int], colors: list[str], at: list[float] | None = None) -> None:
    """Draw a row of squares with step numbers, and a bar where an episode begins."""
    for place, step, color in zip(at or steps, steps, colors, strict=True):
        axes.add_patch(Rectangle((place, y), 0.92, 0.8, color=color))
        axes.text(place + 0.46, y + 0.4, str(step), ha="center", va="center", fontsize=6.5)
        if step in EPISODES[1:]:
            axes.plot([place - 0.04] * 2, [y - 0.08, y + 0.88], color="#b22222", linewidth=2)


def star(axes, x: float, y: float) -> None:
    """Draw a stored state."""
    axes.plot(x - 0.04, y + 0.4, marker="*", markersize=11, color="black", zorder=3)


def chunked(axes, y: float, seq_len: int, burn_in: int = 0, stride: int | None = None) -> float:
    """Draw chunks below each other, each at the position of its steps."""
    chunks = -(-STEPS // seq_len)
    got = windows(torch.arange(chunks), chunks, seq_len, burn_in, STEPS)
    stored = window_starts(STEPS, burn_in, stride or seq_len)
    for chunk in range(chunks):
        position = got.position[chunk].tolist()
        kinds = zip(position, got.is_burn_in[chunk].tolist(), got.is_trained[chunk].tolist(), strict=True)
        kept = [(step, REPLAYED if replayed else TRAINED) for step, replayed, trained in kinds if replayed or trained]
        if stride and (chunk * seq_len) % stride:  # the state is recomputed from the stored one before
            first = chunk * seq_len // stride * stride
            kept = [(step, REPLAYED) for step in range(first, kept[0][0])] + kept
        strip(axes, y, [step for step, _ in kept], [color for _, color in kept])
        if kept[0][0] in stored:
            star(axes, kept[0][0], y)
        y -= 1.0
    return y


def packed(axes, y: float, row_length: int) -> float:
    """Draw rows of whole episodes."""
    is_init = torch.zeros(1, STEPS, dtype=torch.bool)
    is_init[0, list(EPISODES[1:])] = True
    packing = pack_episodes(is_init, row_length)
    for position, is_step in zip(packing.position.tolist(), packing.is_step.tolist(), strict=True):
        colors = [TRAINED if kept else PADDING for kept in is_step]
        strip(axes, y, position, colors, at=[float(place) for place in range(row_length)])
        if position[0] == 0:
            star(axes, 0, y)
        y -= 1.0
    return y


def main(path: str) -> None:
    """Draw all modes and save the picture."""
    modes = {
        "tbptt, seq_len 7": lambda y: chunked(axes, y, 7),
        "burn_in 3, seq_len 7": lambda y: chunked(axes, y, 7, burn_in=3),
        "burn_in 0, seq_len 1 (first four)": None,
        "tbptt, seq_len 4, state_stride 12": lambda y: chunked(axes, y, 4, stride=12),
        "episode (rows of 13)": lambda y: packed(axes, y, 13),
    }
    figure, axes = pyplot.subplots(figsize=(10, 8.4), layout="constrained")
    y = 0.0
    for name, draw in modes.items():
        axes.text(-0.5, y + 0.4, name, ha="right", va="center", fontsize=9)
        if draw is None:
            for step in range(4):
                strip(axes, y, [step], [TRAINED], at=[1.6 * step])
                star(axes, 1.6 * step, y)
            y -= 1.0
        else:
            y = draw(y)
        y -= 0.5
    axes.set(xlim=(-9.5, STEPS + 0.5), ylim=(y + 0.5, 2.2))
    axes.axis("off")
    handles = [Patch(color=TRAINED, label="trained"), Patch(color=REPLAYED, label="replayed, no gradient")]
    handles += [Patch(color=PADDING, label="padding")]
    handles += axes.plot([], [], "*", color="black", markersize=11, label="stored state")
    handles += axes.plot(
        [], [], "|", color="#b22222", markersize=12, markeredgewidth=2, label="an episode begins: reset"
    )
    axes.legend(handles=handles, loc="upper left", ncols=5, frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main(sys.argv[1])
