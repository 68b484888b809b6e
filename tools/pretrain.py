"""Run `moe-bsr pretrain` from a clone of the repository. The code is in moe_bsr/cli/pretrain.py."""

from moe_bsr.cli.main import start

if __name__ == "__main__":
    start("pretrain")
