"""Run `moe-bsr pack` from a clone of the repository. The code is in moe_bsr/cli/pack.py."""

from moe_bsr.cli.main import start

if __name__ == "__main__":
    start("pack")
