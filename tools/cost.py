"""Front of moe_bsr/cli/cost.py."""

import sys

from moe_bsr.cli.cost import main

if __name__ == "__main__":
    sys.exit(main())
