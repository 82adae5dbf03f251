"""What enters the layer in training, computed once per example and kept: everything below it is frozen.

Read first: slf.py. Stage 1 of Sequential Layer Focus trains layer i on layers that no longer move. Where all layers
learn from the same examples (`--slf_cache`), the states that enter layer i are those that entered layer i - 1, one
layer further: a step then runs layer i alone, and the states climb one layer per phase instead of i - 1 per step.

They take 4 d bytes for every token of the stretch's examples: .25 GB for a quarter of an epoch of the equal split with
the small weights, twice that with bert-base.

Differs: BERTer does not say how the frozen layers run. Without the cache they run as in training, dropout included, and
every layer sees other examples; kept states are without dropout, as at inference.
"""

import numpy as np
import torch
from tqdm import tqdm

from errors import smaller, spare_memory


class KeptStates:
    """The states after a frozen layer of some examples, without their padding. Empty: batches start as always.

    Shapes: one tensor [n,d] per encoder pass of every example, where n is its number of tokens.
    """

    def __init__(self):
        self.forget()

    def forget(self):
        """Keep nothing."""
        self.layer, self.states = 0, {}

    def start(self, model, batch, rows):
        """Where a batch of these rows of its task may enter: (layer, hidden), or None where nothing is kept.

        Shapes: hidden: one [b,s,d] per encoder pass, zero where there is padding.
        """
        if not self.states:
            return None
        hidden = []
        for k, mask in enumerate(model.masks(batch)):
            states = torch.cat([self.states[batch.task.name, row][k] for row in rows.tolist()])
            h = states.new_zeros(*mask.shape, states.shape[-1])
            hidden.append(h.masked_scatter(mask.bool().unsqueeze(-1), states))
        return self.layer, tuple(hidden)

    @torch.no_grad()
    def climb(self, model, examples, layer, batch_size, precision, progress=False):
        """Bring the states of {task: (Dataset, rows)} to after `layer`.

        One layer at a time, in the same batches each time: a resumed run, which starts from the embeddings, comes to
        the same numbers. The states of a batch take the place of those before them.
        """
        wanted = {(name, row) for name, (_, rows) in examples.items() for row in rows.tolist()}
        if self.layer > layer or self.states.keys() != wanted:
            self.forget()
        parts = []
        for data, rows in examples.values():
            order = rows[np.argsort(data.lengths()[rows], kind="stable")]
            parts += [(data, order[i : i + batch_size]) for i in range(0, len(order), batch_size)]
        was_training, device = model.training, next(model.parameters()).device
        model.eval()
        advice = f"{smaller('--eval_batch_size', batch_size)}, or start again without --slf_cache"
        for i in range(self.layer + 1, layer + 1):
            with spare_memory(advice), precision():
                for data, part in tqdm(parts, f"states after layer {i}", disable=not progress, leave=False):
                    self.states |= self.step(model, data.batch(part).to(device), part, i)
            self.layer = i
        model.train(was_training)

    def step(self, model, batch, rows, layer):
        """Run one layer over a batch. Returns {(task, row): states after it, one [n,d] per encoder pass}."""
        masks = model.masks(batch)
        _, hidden = self.start(model, batch, rows) if layer > 1 else (0, model.embed(batch))
        [(_, hidden)] = model.encode(hidden, masks, batch.task, layer - 1, layer)
        passes = [h[mask.bool()].split(mask.sum(1).tolist()) for h, mask in zip(hidden, masks, strict=True)]
        return {(batch.task.name, row): states for row, *states in zip(rows.tolist(), *passes, strict=True)}
