"""BERT's encoder, written out: attention, layer, embeddings and pooler; read base_bert.py before it.

The alphabet of every file: b batch, s tokens, d hidden, h heads, k head size, L layers; n rows of a dataset, w the
vector that a task's head sees (d, or 2 d to 3 d for siamese pairs), o what a head gives.
A lone variable h is a hidden state [b,s,d].
"""

import math
from functools import partial

import torch
from torch import nn

from base_bert import ACTIVATIONS, BertPreTrainedModel
from errors import InputError

# Finite in float16 too, so that a row of padding alone gives no NaN, and far enough down that exp gives 0.
MASKED_SCORE = -1e4
# values of the 16 random bits that decide on one number in Dropout
LEVELS = 65536


class Dropout(nn.Module):
    """Set numbers to 0 at random in training and scale the others up, so that the mean stays.

    Source: Srivastava et al. (2014), section 10 (scaling in training).
    Differs: on the CPU one 64-bit draw of the global generator decides on four numbers, which is faster than
    PyTorch's own; p is rounded to a multiple of 1 / LEVELS and the scale is that of the rounded p.
    """

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        """Drop numbers of x; in evaluation, or where p rounds to 0, return x itself."""
        dropped = round(self.p * LEVELS)
        if not self.training or dropped == 0:
            return x
        if x.device.type != "cpu":
            return nn.functional.dropout(x, self.p)
        draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64)
        # from the lowest number on: without it the sign bit is never drawn
        draws.random_(torch.iinfo(torch.int64).min, None)
        bits = draws.view(torch.int16)[: x.numel()].view(x.shape)
        kept = bits >= dropped - LEVELS // 2
        return x * kept.to(x.dtype).mul_(LEVELS / (LEVELS - dropped))


def dropout_state(device):
    """The two functions that get and set the state of the generator that dropout on a device draws from."""
    if device.type == "cuda":
        return partial(torch.cuda.get_rng_state, device), partial(torch.cuda.set_rng_state, device=device)
    source = torch.mps if device.type == "mps" else torch
    return source.get_rng_state, source.set_rng_state


def attend_plain(query, key, value, extended_mask, dropout):
    """Average the values of all tokens, weighted by how well each token's query fits their keys.

    Shapes: query, key, value [b,h,s,k], extended_mask [b,1,1,s]; returns [b,h,s,k].
    """
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])  # [b,h,s,s]
    # a mask of the scores' own dtype: on a CPU a wider one would widen all [b,h,s,s] numbers after it under autocast
    weights = dropout(torch.softmax(scores + extended_mask.to(scores.dtype), dim=-1))
    return weights @ value


def attend_sdpa(query, key, value, extended_mask, dropout):
    """Compute the same as attend_plain in PyTorch's fused kernel.

    Shapes: query, key, value [b,h,s,k], extended_mask [b,1,1,s]; returns [b,h,s,k].
    """
    extended_mask = extended_mask.to(query.dtype)
    dropout_p = dropout.p if dropout.training else 0.0
    return nn.functional.scaled_dot_product_attention(query, key, value, extended_mask, dropout_p)


class BertSelfAttention(nn.Module):
    """Multi-head self-attention, before the output projection.

    Source: Vaswani et al. (2017), section 3.2, equation 1.
    """

    def __init__(self, config, attention):
        super().__init__()
        self.attend = {"plain": attend_plain, "sdpa": attend_sdpa}[attention]
        self.num_attention_heads = config.num_attention_heads
        self.attention_head_size = config.hidden_size // config.num_attention_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = Dropout(config.attention_probs_dropout_prob)

    def split_heads(self, x):
        """Cut the hidden dimension into heads: [b,s,d] to [b,h,s,k]."""
        b, s, _ = x.shape
        x = x.view(b, s, self.num_attention_heads, self.attention_head_size)  # [b,s,h,k]
        return x.transpose(1, 2)  # [b,h,s,k]

    def merge_heads(self, x):
        """Join the heads again: [b,h,s,k] to [b,s,d]."""
        return x.transpose(1, 2).flatten(2)  # [b,s,h,k], [b,s,d]

    def forward(self, h, extended_mask):
        """Let every token gather from the tokens that the mask leaves visible.

        Shapes: h [b,s,d], extended_mask [b,1,1,s]; returns [b,s,d].
        """
        query = self.split_heads(self.query(h))
        key = self.split_heads(self.key(h))
        value = self.split_heads(self.value(h))
        return self.merge_heads(self.attend(query, key, value, extended_mask, self.dropout))


class BertLayer(nn.Module):
    """One Transformer layer: attention and feed-forward, each followed by add and norm.

    Where `adapter` is set it is called at three sites and returns the replacement of what it is given:
    "attention" and "feed_forward" (a sub-layer's output, before the residual is added), and "output" (after
    the last LayerNorm).

    Source: Vaswani et al. (2017), section 3.1; Devlin et al. (2019), section 3.
    Differs: BERTer 3 writes the second residual without the first LayerNorm, LN(h + FFN(LN(h + MH(h)))).
    """

    def __init__(self, config, layer_index, attention):
        super().__init__()
        self.layer_index = layer_index
        self.self_attention = BertSelfAttention(config, attention)
        self.attention_dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.attention_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention_dropout = Dropout(config.hidden_dropout_prob)
        self.interm_dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.interm_af = ACTIVATIONS[config.hidden_act]
        self.out_dense = nn.Linear(config.intermediate_size, config.hidden_size)
        self.out_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.out_dropout = Dropout(config.hidden_dropout_prob)
        self.adapter = None

    def adapt(self, sublayer_output, layer_input, extended_mask, task, site):
        """Pass an output through the adapter, if there is one."""
        if self.adapter is None:
            return sublayer_output
        return self.adapter(sublayer_output, layer_input, extended_mask, self.layer_index, task, site)

    def forward(self, h, extended_mask, task=None):
        """Compute the next hidden state.

        Shapes: h [b,s,d], extended_mask [b,1,1,s]; returns [b,s,d].
        """
        attended = self.attention_dropout(self.attention_dense(self.self_attention(h, extended_mask)))
        attended = self.adapt(attended, h, extended_mask, task, "attention")
        middle = self.attention_layer_norm(h + attended)

        transformed = self.out_dropout(self.out_dense(self.interm_af(self.interm_dense(middle))))
        transformed = self.adapt(transformed, h, extended_mask, task, "feed_forward")
        output = self.out_layer_norm(middle + transformed)
        return self.adapt(output, h, extended_mask, task, "output")


def build_embedding(rows, d, padding_idx=None):
    """Make an embedding table without drawing its numbers: init_weights or from_pretrained fills it."""
    return nn.Embedding.from_pretrained(torch.empty(rows, d), freeze=False, padding_idx=padding_idx)


class BertModel(BertPreTrainedModel):
    """BERT without a task: embeddings, layers and pooler.

    `attention` is "plain" (written out) or "sdpa" (PyTorch's fused kernel).

    Source: Devlin et al. (2019), section 3.
    """

    def __init__(self, config, attention="plain", generator=None):
        super().__init__(config)
        d = config.hidden_size
        self.word_embedding = build_embedding(config.vocab_size, d, config.pad_token_id)
        self.pos_embedding = build_embedding(config.max_position_embeddings, d)
        self.tk_type_embedding = build_embedding(config.type_vocab_size, d)
        self.embed_layer_norm = nn.LayerNorm(d, eps=config.layer_norm_eps)
        self.embed_dropout = Dropout(config.hidden_dropout_prob)
        self.bert_layers = nn.ModuleList(
            BertLayer(config, layer_index, attention) for layer_index in range(config.num_hidden_layers)
        )
        self.pooler_dense = nn.Linear(d, d)
        self.pooler_af = nn.Tanh()
        # from_pretrained builds on the meta device, where there is nothing to draw
        if not self.pooler_dense.weight.is_meta:
            self.init_weights(generator)

    def embed(self, input_ids, token_type_ids=None):
        """Sum the word, position and segment embeddings, then LayerNorm and dropout.

        Shapes: input_ids and token_type_ids [b,s]; returns [b,s,d].
        Raises: InputError for more tokens than there are positions.
        """
        s = input_ids.shape[1]
        if s > self.config.max_position_embeddings:
            raise InputError(
                f"a text of {s} tokens is longer than the {self.config.max_position_embeddings} "
                "that this model takes: shorten it"
            )
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        position_ids = torch.arange(s, device=input_ids.device)
        embedding = self.word_embedding(input_ids) + self.tk_type_embedding(token_type_ids)
        embedding = embedding + self.pos_embedding(position_ids)  # [b,s,d] + [s,d]
        return self.embed_dropout(self.embed_layer_norm(embedding))

    def extend_mask(self, mask, dtype):
        """Turn a mask of 1 (token) and 0 (padding) into what is added to the attention scores.

        Shapes: mask [b,s]; returns [b,1,1,s].
        Differs: the same finite score in every precision, not the lowest number of the dtype.
        """
        return (1.0 - mask[:, None, None, :].to(dtype)) * MASKED_SCORE

    def encode(self, h, mask, task=None, start=0, stop=None):
        """Run the layers after `start` up to and with `stop`, yielding (i, h) after layer i.

        Shapes: h [b,s,d], mask [b,s]; yields h [b,s,d].
        """
        extended_mask = self.extend_mask(mask, h.dtype)
        for layer_index in range(start, self.config.num_hidden_layers if stop is None else stop):
            h = self.bert_layers[layer_index](h, extended_mask, task)
            yield layer_index + 1, h

    def pool(self, h):
        """Turn the first token's state into the sentence vector.

        Shapes: h [b,s,d]; returns [b,d].
        """
        return self.pooler_af(self.pooler_dense(h[:, 0]))

    def forward(self, input_ids, attention_mask, token_type_ids=None):
        """Give the last hidden state and the pooled sentence vector of each text.

        Shapes: arguments [b,s]; returns last_hidden_state [b,s,d] and pooler_output [b,d].
        """
        h = self.embed(input_ids, token_type_ids)
        extended_mask = self.extend_mask(attention_mask, h.dtype)
        for layer in self.bert_layers:
            h = layer(h, extended_mask)
        return {"last_hidden_state": h, "pooler_output": self.pool(h)}
