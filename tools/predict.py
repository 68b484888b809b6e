"""Run `moe-bsr predict` from a clone of the repository. The code is in moe_bsr/cli/predict.py."""

from moe_bsr.cli.main import start

if __name__ == "__main__":
    start("predict")
