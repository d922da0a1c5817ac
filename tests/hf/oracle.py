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
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    s = s.masked_fill(~marked.repeat_interleave(group, 1)[:, :, None], float("-inf"))
    if s_aux is not None:
        s = torch.cat([s, s_aux.double().view(1, -1, 1, 1).expand(*s.shape[:3], 1)], -1)
    return (s.softmax(-1)[..., : key.shape[2]] @ v).to(query.dtype).transpose(1, 2).contiguous(), None


AttentionInterface.register("kvlib_oracle", attention)
AttentionMaskInterface.register("kvlib_oracle", lambda *args, **kwargs: None)


def show(cache, pads, windows):
    """Mark what `cache` holds now and the next step will see; pads[r] columns of row r are padding, windows[layer][head] is
    the StreamingLLM of heads that see a window only."""
    for i, layer in enumerate(cache.managed):
        rows = layer.store.positions()
        mark = torch.zeros(len(rows), len(rows[0]), layer.seen, dtype=torch.bool)
        for r, row in enumerate(rows):
            for h, positions in enumerate(row):
                seen = positions.long()
                if windows[i][h] is not None:
                    coming = int(seen.max()) + 1
                    seen = seen[(seen < windows[i][h].sink) | (seen > coming - windows[i][h].recent)]
                mark[r, h, seen + pads[r]] = True
        VISIBLE[i] = mark


@torch.no_grad()
def filled(model, ids, mask):
    """A stock cache that has read the prompt in full."""
    model.set_attn_implementation("eager")
    cache = DynamicCache(config=model.config)
    model(ids, attention_mask=mask, past_key_values=cache)
    return cache
