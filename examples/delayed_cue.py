"""Recall a cue after 1000 blank steps: recurrent PPO on the delayed cue task.

python examples/delayed_cue.py
python examples/delayed_cue.py backbone=gru env.horizon=200 train.seed=3
python examples/delayed_cue.py train=none            # the control without memory: stays at chance

The last line of stdout is the summary as one JSON object.
"""

import sys

from cyborg_torchrl.training.command import main

if __name__ == "__main__":
    sys.exit(main(description=__doc__, default_config="memory_delayed_cue_recurrent"))
