"""One compute thread: the tests' tensors are tiny, and spinning threads would slow everything down."""

import torch

torch.set_num_threads(1)
