"""Learn to remember over short delays first: three runs, each of which begins with what the one before has learned.

python examples/curriculum.py
python examples/curriculum.py backbone=gru train.seed=3
"""

import json
import logging
import sys

from cyborg_torchrl import ConfigError, load_config
from cyborg_torchrl.training.builders import prepare_process
from cyborg_torchrl.training.experiment import run_experiment

logging.getLogger("torchrl").setLevel(logging.WARNING)  # it reports each buffer that it creates
HORIZONS = (10, 40, 160)
UPDATES = 10

run = None
for horizon in HORIZONS:
    overrides = [
        f"env.horizon={horizon}",
        f"backbone.max_horizon={HORIZONS[-1]}",  # memory is built once, for the longest delay
        f"train.total_timesteps={UPDATES * 64 * (horizon + 2)}",  # 64 environments, an episode has horizon + 2 steps
        *([f"init_from={run}"] if run else []),
        *sys.argv[1:],
    ]
    try:
        cfg = load_config("memory_delayed_cue_recurrent", overrides)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    prepare_process(cfg)
    summary = run_experiment(cfg)
    run = summary["run_dir"]
    print(json.dumps({key: summary[key] for key in ("horizon", "success_rate", "total_timesteps", "run_dir")}))
