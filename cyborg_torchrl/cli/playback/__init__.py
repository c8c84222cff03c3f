"""Episodes of a trained agent, as a film or as text."""

from cyborg_torchrl.cli.playback.episodes import Frame, play
from cyborg_torchrl.cli.playback.film import FILMS, Film
from cyborg_torchrl.cli.playback.trace import Trace

__all__ = ["FILMS", "Film", "Frame", "Trace", "play"]
