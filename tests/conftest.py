"""What every test shares: one thread, so that the tests of a busy machine stay quick and repeatable."""

import torch

torch.set_num_threads(1)
