"""moe_bsr: fine-tune one Vision Transformer for several tasks on the machine that will use it.

Block Selective Reprogramming (Sarkar et al. 2024, arXiv 2405.10951) and its mixture-of-experts
multitask extension. `train(config)` trains, `load(run)` brings a trained model back with its transforms
and class names; `moe_bsr.config.load` reads a configuration.
"""

from moe_bsr.run import load
from moe_bsr.train import train

__all__ = ["load", "train"]
