"""`python -m moe_bsr COMMAND ...`, the same as `moe-bsr COMMAND ...`."""

from moe_bsr.cli.main import start

if __name__ == "__main__":
    start()
