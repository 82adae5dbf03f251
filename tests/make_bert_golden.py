"""Write golden/bert.npz: a tiny random BERT with transformers' results; needs transformers."""

import sys
from pathlib import Path

import numpy as np
import torch

SIZES = {
    "vocab_size": 40,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "max_position_embeddings": 16,
    "type_vocab_size": 2,
}


def main():
    """Draw a model and a padded batch of pairs; store weights, inputs, states, pooled vectors, gradients."""
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES, initializer_range=0.3)
    model = transformers.BertModel._from_config(config, attn_implementation="eager").double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # as stored, so that both sides start from the same numbers
            parameter.copy_((parameter + 0.1 * torch.randn_like(parameter)).float())
    input_ids = torch.randint(1, SIZES["vocab_size"], (3, 9))
    mask = (torch.arange(9) < torch.tensor([[9], [4], [7]])).long()
    types = (torch.arange(9) >= 3).long().expand(3, 9).contiguous()
    input_ids = input_ids * mask
    output = model(input_ids, mask, types, output_hidden_states=True)
    (output.pooler_output.sum() + output.last_hidden_state.square().sum()).backward()
    arrays = {"input_ids": input_ids, "mask": mask, "types": types, "pooler_output": output.pooler_output}
    for i, h in enumerate(output.hidden_states):
        arrays[f"hidden.{i}"] = h
    for name, parameter in model.named_parameters():
        arrays[f"weight.{name}"] = parameter.float()
        arrays[f"gradient.{name}"] = parameter.grad.float()
    path = Path(__file__).parent / "golden" / "bert.npz"
    path.parent.mkdir(exist_ok=True)
    np.savez_compressed(path, **{name: array.detach().numpy() for name, array in arrays.items()})
    print(f"{path}: {path.stat().st_size} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
