"""`python -m cyborg_torchrl` is the command `cyborg-torchrl`."""

import sys

from cyborg_torchrl.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
