"""Is a recurrent policy trained on what it saw when it acted? A table, and JSON; see docs/checker.md.

python examples/verify_recurrent_ppo.py --backbone gru
python examples/verify_recurrent_ppo.py --all --json report.json --plot horizon.png
python examples/verify_recurrent_ppo.py --policy my_module:build     # a function that returns (policy, env)

Exit code: 0 healthy, 1 something is accused, 2 it could not be checked.
"""

import sys

from cyborg_torchrl.memory_benchmarks.verify import main

if __name__ == "__main__":
    sys.exit(main())
