"""Collect wood from pixels in 8000-step episodes: recurrent PPO with states replayed from a burn-in.

python examples/treechop.py                          # Crafter collect-wood: pip install 'cyborg-torchrl[benchmarks]'
python examples/treechop.py env.backend=minerl       # MineRL Treechop: see docs/treechop.md

The last line of stdout is the summary as one JSON object. The return of an episode is the collected wood.
"""

import sys

from cyborg_torchrl.training.command import main

if __name__ == "__main__":
    sys.exit(main(description=__doc__, default_config="treechop_ppo_recurrent"))
