"""Exits: a classifier after every layer. Read first: bert.py, tasks.py."""

import copy

from torch import nn


class Exit(nn.Module):
    """The classifier g_i of layer i: one pooler shared by the tasks and one head per task.

    The pooler starts from the pretrained one, the heads from nothing. The last layer's exit is the ordinary pooler
    and heads of the model, so it is not built here. With mean pooling there is no pooler to copy.
    Shapes: pool: [b,s,d] -> [b,d].
    Source: BERTer 3.3, L_i = H(y, g_i(h_i; w_i)); DeeBERT.
    """

    def __init__(self, bert, make_heads, with_pooler):
        super().__init__()
        self.pooler_dense = copy.deepcopy(bert.pooler_dense) if with_pooler else None
        self.pooler_af = nn.Tanh()
        self.heads = make_heads()

    def pool(self, h):
        """The vector of the first token through this exit's pooler."""
        return self.pooler_af(self.pooler_dense(h[:, 0]))
