"""Run `moe-bsr evaluate` from a clone of the repository. The code is in moe_bsr/cli/evaluate.py."""

from moe_bsr.cli.main import start

if __name__ == "__main__":
    start("evaluate")
