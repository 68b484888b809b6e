"""`moe-bsr cost` for a clone of the repository; the code is in moe_bsr/cli/cost.py."""

from moe_bsr.cli.main import start

if __name__ == "__main__":
    start("cost")
