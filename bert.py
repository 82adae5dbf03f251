"""BERT's encoder, written out: attention, layer, embeddings and pooler.

    attention(Q, K, V) = softmax(Q K^T / sqrt(k) + mask) V       in each head; Q, K and V are linear maps of h
    MH(h)              = W_O [head 1; head 2; ...] + b_O         multi-head attention, all heads joined
    FFN(x)             = W_2 GELU(W_1 x + b_1) + b_2             feed-forward network, for each token alone
    layer(h)           = LN(x + FFN(x)),  x = LN(h + MH(h))      LN is LayerNorm; both sums are residuals

    h_0 = LN(word + position + segment),  h_i = layer_i(h_{i-1}),  pooled = tanh(W_P h_L[first token] + b_P)

Dropout follows h_0, the attention's softmax, MH and FFN. Sources: Vaswani et al. (2017), section 3; Devlin et al.
(2019), section 3.

The letters in the shapes of every file: b rows of a batch, s tokens, d hidden units, h attention heads, k units of an
attention head, f units of the feed-forward network, L layers; n rows of a dataset, w the width of the vector that a
task's head sees (d, or 2 d or 3 d for siamese pairs), o the outputs of a task's head. Outside a shape, h is a hidden
state [b,s,d].
"""

import math

import torch
from torch import nn

from base_bert import ACTIVATIONS, BertPreTrainedModel, Dropout
from errors import InputError

# Finite in float16 too, so that a row of padding alone gives no NaN, and so low that exp gives 0.
MASKED_SCORE = -1e4


def attend_plain(query, key, value, extended_mask, dropout):
    """For each token, average the values of all tokens, weighted by how well its query fits their keys.

    Shapes: query, key, value [b,h,s,k], extended_mask [b,1,1,s]; returns [b,h,s,k].
    Source: Vaswani et al. (2017), equation 1.
    """
    # One score per pair of tokens. A sum of k products grows like sqrt(k); the division undoes that.
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])  # [b,h,s,k] @ [b,h,k,s] -> [b,h,s,s]
    # The mask is the same for all heads and queries. It is cast to the scores' dtype, because a float32 mask would
    # turn bf16 scores into slow float32.
    scores = scores + extended_mask.to(scores.dtype)  # [b,h,s,s] + [b,1,1,s]
    # The softmax runs over the keys: the weights of one query sum to 1.
    # In the scores' dtype: autocast on a GPU would turn bf16 into float32 here.
    weights = dropout(torch.softmax(scores, dim=-1, dtype=scores.dtype))  # [b,h,s,s]
    return weights @ value  # [b,h,s,s] @ [b,h,s,k] -> [b,h,s,k]


def attend_sdpa(query, key, value, extended_mask, dropout):
    """Compute the same as attend_plain in PyTorch's fused kernel, which draws dropout masks of its own.

    Shapes: query, key, value [b,h,s,k], extended_mask [b,1,1,s]; returns [b,h,s,k].
    """
    extended_mask = extended_mask.to(query.dtype)  # the kernel demands one dtype
    # The kernel drops weights in evaluation too, unless p is 0 there.
    dropout_p = dropout.p if dropout.training else 0.0
    return nn.functional.scaled_dot_product_attention(query, key, value, extended_mask, dropout_p)


def unchanged(site, output):
    """Return a layer's output as it is: what `adapt` does without an adapter."""
    return output


class BertSelfAttention(nn.Module):
    """Multi-head self-attention, before the output projection.

    Source: Vaswani et al. (2017), section 3.2.
    """

    def __init__(self, config, attention):
        super().__init__()
        self.attend = {"plain": attend_plain, "sdpa": attend_sdpa}[attention]
        self.num_attention_heads = config.num_attention_heads
        self.attention_head_size = config.hidden_size // config.num_attention_heads
        # each matrix holds the h matrices [k,d] of all heads, one below the other: [d,d]
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = Dropout(config.attention_probs_dropout_prob)

    def split_heads(self, x):
        """Cut the hidden dimension into heads: [b,s,d] to [b,h,s,k]."""
        b, s, _ = x.shape
        x = x.view(b, s, self.num_attention_heads, self.attention_head_size)  # [b,s,h,k]
        # heads before tokens, so that @ multiplies token by token within each head
        return x.transpose(1, 2)  # [b,h,s,k]

    def merge_heads(self, x):
        """Join the heads again: [b,h,s,k] to [b,s,d]."""
        return x.transpose(1, 2).flatten(2)  # [b,s,h,k], then [b,s,d]

    def forward(self, h, extended_mask, adapt=unchanged):
        """Let every token attend to the tokens that the mask leaves visible.

        Shapes: h [b,s,d], extended_mask [b,1,1,s]; returns [b,s,d].
        """
        # projections [b,s,d], then heads [b,h,s,k]
        query = self.split_heads(adapt("query", self.query(h)))
        key = self.split_heads(adapt("key", self.key(h)))
        value = self.split_heads(adapt("value", self.value(h)))
        return self.merge_heads(self.attend(query, key, value, extended_mask, self.dropout))


class BertLayer(nn.Module):
    """One Transformer layer: attention and feed-forward, each followed by add and norm.

    `adapt(site, output)` returns what replaces an output of the layer. The sites are "query", "key" and "value" (the
    projections of h), "attention" and "feed_forward" (a sub-layer's output after dropout, before the residual), and
    "output" (after the last LayerNorm).

    Source: Vaswani et al. (2017), section 3.1; Devlin et al. (2019), section 3.
    Differs: BERTer 3 adds h, not x, to the feed-forward network's output: LN(h + FFN(LN(h + MH(h)))).
    """

    def __init__(self, config, attention):
        super().__init__()
        self.self_attention = BertSelfAttention(config, attention)
        self.attention_dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.attention_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention_dropout = Dropout(config.hidden_dropout_prob)
        self.interm_dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.interm_af = ACTIVATIONS[config.hidden_act]
        self.out_dense = nn.Linear(config.intermediate_size, config.hidden_size)
        self.out_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.out_dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, h, extended_mask, adapt=unchanged):
        """Compute the next hidden state.

        Shapes: h [b,s,d], extended_mask [b,1,1,s]; returns [b,s,d].
        """
        # MH(h): W_O mixes the outputs of the heads
        attended = self.attention_dropout(self.attention_dense(self.self_attention(h, extended_mask, adapt)))
        # x: the residual adds the input, so the sub-layer learns only a change of it
        middle = self.attention_layer_norm(h + adapt("attention", attended))  # [b,s,d]

        # FFN(x): each token goes through a wider layer, [b,s,d] -> [b,s,f] -> [b,s,d]
        transformed = self.out_dropout(self.out_dense(self.interm_af(self.interm_dense(middle))))
        output = self.out_layer_norm(middle + adapt("feed_forward", transformed))  # [b,s,d]
        return adapt("output", output)


def build_embedding(rows, d, padding_idx=None):
    """Make an embedding table without drawing its numbers: init_weights or from_pretrained fills it."""
    return nn.Embedding.from_pretrained(torch.empty(rows, d), freeze=False, padding_idx=padding_idx)


class BertModel(BertPreTrainedModel):
    """BERT without a task: embeddings, layers and pooler.

    `attention` is "plain" (written out) or "sdpa" (PyTorch's fused kernel). `make_adapt` is None or a function:
    make_adapt(layer_index, task_name, h, extended_mask) returns the `adapt` of one layer (see BertLayer).

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
        self.bert_layers = nn.ModuleList(BertLayer(config, attention) for _ in range(config.num_hidden_layers))
        self.pooler_dense = nn.Linear(d, d)
        self.pooler_af = nn.Tanh()
        self.make_adapt = None
        # from_pretrained builds on the meta device, where tensors have no numbers to draw
        if not self.pooler_dense.weight.is_meta:
            self.init_weights(generator)

    def embed(self, input_ids, token_type_ids=None):
        """Sum the word, position and segment embeddings, then LayerNorm and dropout.

        Shapes: input_ids and token_type_ids (the segment ids) [b,s]; returns [b,s,d].
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
        embedding = self.word_embedding(input_ids) + self.tk_type_embedding(token_type_ids)  # [b,s,d]
        embedding = embedding + self.pos_embedding(position_ids)  # [b,s,d] + [s,d]: the same positions in every row
        return self.embed_dropout(self.embed_layer_norm(embedding))

    def extend_mask(self, mask, dtype):
        """Turn a mask of 1 (token) and 0 (padding) into the numbers that are added to the attention scores.

        Shapes: mask [b,s]; returns [b,1,1,s].
        Differs: transformers adds the lowest number of the dtype; here every dtype has the same finite score.
        """
        # 1 becomes 0 and 0 becomes MASKED_SCORE; the two new dimensions stand for all heads and all queries
        return (1.0 - mask[:, None, None, :].to(dtype)) * MASKED_SCORE

    def encode(self, h, mask, task_name=None, start=0, stop=None):
        """Run layers start + 1 .. stop (by default all), yielding (i, h) after layer i.

        A generator, so that the caller can read the states between the layers (early exit). `task_name` selects the
        adapters; without it the layers are plain.

        Shapes: h [b,s,d], mask [b,s]; yields h [b,s,d].
        """
        extended_mask = self.extend_mask(mask, h.dtype)
        for layer_index in range(start, self.config.num_hidden_layers if stop is None else stop):
            adapt = unchanged
            if self.make_adapt is not None and task_name is not None:
                adapt = self.make_adapt(layer_index, task_name, h, extended_mask)
            h = self.bert_layers[layer_index](h, extended_mask, adapt)
            yield layer_index + 1, h

    def pool(self, h):
        """Turn the first token's state into the sentence vector.

        Shapes: h [b,s,d]; returns [b,d].
        """
        return self.pooler_af(self.pooler_dense(h[:, 0]))  # h[:, 0] [b,d] is the state of [CLS]

    def forward(self, input_ids, attention_mask, token_type_ids=None):
        """Compute the last hidden state and the pooled sentence vector of each text.

        Shapes: arguments [b,s]; returns last_hidden_state [b,s,d] and pooler_output [b,d].
        """
        for _, state in self.encode(self.embed(input_ids, token_type_ids), attention_mask):
            h = state  # after the loop: the state after the last layer
        return {"last_hidden_state": h, "pooler_output": self.pool(h)}


# --- the names of the CS224N skeleton -----------------------------------------------------------------------------


def attention(self, key, query, value, attention_mask):
    """Attend in each head and join the heads. Shapes: three times [b,h,s,k], [b,1,1,s]; returns [b,s,d]."""
    return self.merge_heads(self.attend(query, key, value, attention_mask, self.dropout))


def add_norm(self, input, output, dense_layer, dropout, ln_layer):
    """Finish a sub-layer: LN(input + dropout(dense(output))). Shapes: [b,s,d]; returns [b,s,d]."""
    return ln_layer(input + dropout(dense_layer(output)))


# No code here calls these two methods. They stand here so that a reader meets the classes without them.
BertSelfAttention.attention, BertLayer.add_norm = attention, add_norm
