"""A full cache that is shown only what a compressed one holds: the numerical oracle of every eviction."""

import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

VISIBLE = {}


def attention(module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, **kwargs):
    """Plain float64 attention over the keys marked in VISIBLE[layer] [B, Hkv, T], newer ones always."""
    group = query.shape[1] // key.shape[1]
    marked = VISIBLE[module.layer_idx]
    marked = torch.nn.functional.pad(marked, (0, key.shape[2] - marked.shape[2]), value=True)
    k, v = (x.double().repeat_interleave(group, 1) for x in (key, value))
    s = query.double() @ k.transpose(-1, -2) * scaling
    s = s.masked_fill(~marked.repeat_interleave(group, 1)[:, :, None], float("-inf"))
    return (s.softmax(-1) @ v).to(query.dtype).transpose(1, 2).contiguous(), None


AttentionInterface.register("kvlib_oracle", attention)
AttentionMaskInterface.register("kvlib_oracle", lambda *args, **kwargs: None)


def show(cache, pads):
    """Mark what `cache` holds now; pads[r] columns of row r are padding."""
    for i, layer in enumerate(cache.managed):
        rows = layer.store.positions()
        mark = torch.zeros(len(rows), len(rows[0]), layer.seen, dtype=torch.bool)
        for r, row in enumerate(rows):
            for h, positions in enumerate(row):
                mark[r, h, positions.long() + pads[r]] = True
        VISIBLE[i] = mark


@torch.no_grad()
def filled(model, ids, mask):
    """A stock cache that has read the prompt in full."""
    model.set_attn_implementation("sdpa")
    cache = DynamicCache(config=model.config)
    model(ids, attention_mask=mask, past_key_values=cache)
    return cache
