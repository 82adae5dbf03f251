"""What the checks share: the inputs of one case, drawn from a seed, and tiny models."""

import zlib

import numpy as np
import torch

SIZES = 3  # every check runs for the sizes 0, 1, 2: from a case that is small enough to compute by hand


class Draw:
    """The inputs of one case of a check. Size 0 is the smallest case.

    `given` are the inputs that the report prints.
    """

    def __init__(self, check, seed, size):
        self.rng, self.size, self.given = np.random.default_rng([seed, zlib.crc32(check.encode()), size]), size, {}

    def show(self, **given):
        """Print these inputs in the report if the check fails for this case.

        An input "p for X" is printed only where a result with X in its name differs.
        """
        # copies: the function may change its arguments in place
        self.given |= {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in given.items()}

    def number(self, low, high):
        """Return a whole number from low to high."""
        return int(self.rng.integers(low, high + 1))

    def numbers(self, low, high, *shape):
        """Return whole numbers from low to high."""
        return torch.from_numpy(self.rng.integers(low, high + 1, shape))

    def uniform(self, low, high, *shape):
        """Return real numbers from low to high, in float64; one number of Python without a shape."""
        values = self.rng.uniform(low, high, shape)
        return torch.from_numpy(values) if shape else float(values)

    def normal(self, *shape):
        """Return standard normal numbers, rounded to two digits so that the report is short to read."""
        return torch.from_numpy(self.rng.standard_normal(shape).round(2))

    def choice(self, values):
        """Return one of several values."""
        return values[self.number(0, len(values) - 1)]

    def mask(self, b, s):
        """Return a mask [b,s] with between 1 and s tokens in each row; the first row has padding where s > 1."""
        lengths = self.numbers(1, s, b)
        lengths[0] = max(1, s - 1)
        return (torch.arange(s) < lengths[:, None]).long()

    def generator(self):
        """Return a generator of torch's random numbers."""
        return torch.Generator().manual_seed(self.number(0, 2**31))

    def randomise(self, module):
        """Draw all parameters of a module anew, in float64, so that none is 0 or 1; return the module."""
        module = module.double()
        with torch.no_grad():
            for part in module.modules():
                for name, parameter in part.named_parameters(recurse=False):
                    centre = float(isinstance(part, torch.nn.LayerNorm) and name == "weight")
                    parameter.copy_(centre + 0.4 * torch.from_numpy(self.rng.standard_normal(parameter.shape)))
        return module

    def config(self, layers=2, heads=None):
        """Return the configuration of a tiny BERT without dropout: one head in the smallest case, more in others."""
        from base_bert import BertConfig

        heads = heads or 1 + min(self.size, 1) * self.number(1, 2)
        # LayerNorm turns two numbers into 1 and -1, whatever they are, so a hidden size below 4 would hide mistakes
        hidden = heads * (self.number(2, 3) if heads > 1 else self.number(4, 5))
        return BertConfig(
            vocab_size=20,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=hidden + 2,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            max_position_embeddings=24,
        )

    def model(self, tasks=None, layers=2, **keywords):
        """Return a tiny MultitaskBERT with random parameters, in float64 and in evaluation mode."""
        from bert import BertModel
        from multitask_classifier import MultitaskBERT
        from tasks import build_tasks

        bert = BertModel(self.config(layers), generator=self.generator())
        model = MultitaskBERT(bert, tasks or build_tasks(), 0.0, init=self.generator(), **keywords)
        return self.randomise(model).eval()

    def batch(self, task, b=None, s=None):
        """Return a batch of a task with padding and labels."""
        from datasets import Batch

        b, s = b or self.number(1, 1 + self.size), s or self.number(4, 5 + self.size)
        segments = []
        for k in range(2 if task.encoding in ("embed_concat", "siamese") else 1):
            mask = self.mask(b, s)
            ids = self.numbers(5, 19, b, s) * mask
            types = (torch.arange(s) >= s // 2).long().expand(b, s) * mask * (task.encoding == "concat")
            segments.append((ids, mask, types + k * (task.encoding == "embed_concat")))
        low, high = task.label_range
        labels = self.uniform(low, high, b) if task.is_regression else self.numbers(low, high, b)
        return Batch(task, tuple(segments), labels.double(), tuple(f"id{i}" for i in range(b)))


def gradients_of(module, inputs, function):
    """Return the gradients of the sum of the squares of function(*inputs), to the inputs and a module's parameters."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    wanted = [*inputs, *([] if module is None else module.parameters())]
    value = function(*(x + 0 for x in inputs)).square().sum()
    found = torch.autograd.grad(value, wanted, allow_unused=True)
    return torch.cat([(torch.zeros_like(x) if g is None else g).flatten() for x, g in zip(wanted, found, strict=True)])


class Scale(torch.nn.Module):
    """A stand-in for dropout that can be foreseen: numbers times a fixed pattern of factors."""

    p = 0.0

    def forward(self, x):
        """Multiply the last dimension by 1/2, 1, 3/2, ..."""
        return x * (1 + torch.arange(x.shape[-1], dtype=x.dtype)) / 2


def call(function, *arguments):
    """Return what a function returns, or the name of the user's error that it raises."""
    from errors import InputError

    try:
        return function(*arguments)
    except InputError:
        return "InputError"
