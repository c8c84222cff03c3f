"""Verify recurrent PPO by four tests: buffer size, state storage and retrieval, full training loop, gradient flow.

python scripts/verify_recurrent_ppo.py
python scripts/verify_recurrent_ppo.py --all --json report.json --plot horizon.png
python scripts/verify_recurrent_ppo.py --policy my_module:build     # a function that returns (policy, env)

Then it runs every check of docs/checker.md. It has the options of `cyborg-torchrl check`.
Exit code: 0 if everything passed, 1 if something failed, 2 if it could not be checked.
"""

import sys

from cyborg_torchrl.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["check", *sys.argv[1:]]))
