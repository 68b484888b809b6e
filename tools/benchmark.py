"""Run `moe-bsr benchmark` from a clone of the repository. The code is in moe_bsr/cli/benchmark.py."""

from moe_bsr.cli.main import start

if __name__ == "__main__":
    start("benchmark")
