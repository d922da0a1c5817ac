"""Say what a cache holds, what it gave up and what ran."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from kvlib.hf import Cache


_OPERATIONS = {"decode": "attention of steps", "prompts": "attention of prompts", "codes": "reading of codes"}


def report(cache: Cache) -> str:
    """Plain text, a fact per line."""
    lines = [f"recipe      {cache.recipe}" + ("  (lossy: evicted tokens are gone)" if cache.recipe.lossy else "")]
    spec = cache.spec
    stock = len(cache.layers) - len(cache.managed)
    kept_stock = f"; {stock} sliding or linear layers keep their stock cache" if stock else ""
    lines.append(
        f"model       {spec.family}: {spec.layers} layers, {spec.q_heads} query and {spec.kv_heads} KV heads of size "
        f"{spec.head_dim}{kept_stock}"
    )
    lines += _tokens(cache)
    lines += _bytes(cache)
    lines += _codec(cache)
    lines += _selection(cache)
    if cache.table is not None:
        lines.append(_heads(cache))
    lines += _ran(cache)
    return "\n".join(lines)


def _ran(cache: Cache) -> list[str]:
    """What computed what, as was noted where it was decided."""
    devices = {layer.store.device for layer in cache.managed if layer.store.shape is not None}
    names = {"the CPU" if x.type == "cpu" else torch.cuda.get_device_name(x) for x in devices}
    by: dict[str, set[str]] = {}
    for what, what_by in set().union(*(layer.store.ran for layer in cache.managed)):
        by.setdefault(what, set()).add(what_by)
    if not by:
        return []
    parts = [f"{_OPERATIONS.get(what, what)} by {' and '.join(sorted(by[what]))}" for what in sorted(by)]
    return [f"ran         on {', '.join(sorted(names))}: {'; '.join(parts)}"]


def _tokens(cache: Cache) -> list[str]:
    kept = cache.kept()
    if not kept.numel() or not cache.managed:
        return ["tokens      none yet"]
    kept = kept[torch.from_numpy(cache.managed_layers)]
    seen = [int(n) for n in cache.managed[0].store.groups[0].tokens]
    total = sum(seen) * kept.shape[0] * kept.shape[2]
    held = int(kept.sum())
    given_up = 100 * (1 - held / max(1, total))
    rows = str(seen[0]) if len(seen) == 1 else f"{min(seen)} to {max(seen)} in {len(seen)} rows"
    span = f"{int(kept.min())} to {int(kept.max())}"
    return [f"tokens      seen {rows}; held per head {span}; given up {given_up:.1f} % of all keys and values"]


def _bytes(cache: Cache) -> list[str]:
    tiers = {name: size for name, size in cache.nbytes().items() if size}
    parts = {name: size for name, size in cache.nbytes(by="part").items() if size}
    total = sum(parts.values())
    full = cache.full_nbytes()
    own = total - parts.get("stock", 0)
    share = f"; kvlib's layers {100 * own / full:.1f} % of the {full:,} that all their tokens would take" if full else ""
    split = ", ".join(f"{name} {size:,}" for name, size in parts.items())
    where = " and ".join(f"{size:,} allocated on the {name}" for name, size in tiers.items()) or "0 allocated"
    return [f"bytes       {where}{share}" + (f" ({split})" if split else "")]


def _codec(cache: Cache) -> list[str]:
    """What a codec makes of the body."""
    codec, dense = cache.recipe.codec, 0
    if codec is None:
        return []
    for layer in cache.managed:
        for group in layer.store.groups:
            if group.tail is not None and group.codec is not None and group.body is not None:
                k, v = group.tail.k, group.tail.v
                tokens = int(group.body.counts.sum()) * (k.shape[1] if group.body.counts.ndim == 1 else 1)
                dense += tokens * (k.shape[3] + v.shape[3]) * k.element_size()
    used = cache.nbytes(by="part", used=True)["body"]
    exact = all(form.exact for member in codec.members() for form in member.forms())
    how = "to the bit" if exact else "rounded: what is read is near what was written, not equal to it"
    share = f"body {100 * used / dense:.1f} % of its dense bytes; " if dense else "nothing is old enough yet; "
    return [f"codec       {share}{how}"]


def _selection(cache: Cache) -> list[str]:
    """How a selector finds what it reads, and what that cost."""
    lines = []
    select = cache.recipe.select
    attended = cache.attended()[torch.from_numpy(cache.managed_layers)]
    kept = cache.kept()[torch.from_numpy(cache.managed_layers)]
    if select is not None and kept.numel():
        used = cache.nbytes(by="part", used=True)
        share = 100 * used["index"] / max(1, used["body"])
        lines.append(
            f"reads       {int(attended.min())} to {int(attended.max())} tokens per head and query "
            f"({100 * int(attended.sum()) / max(1, int(kept.sum())):.1f} % of those held); index {used['index']:,} bytes, "
            f"{share:.1f} % of the body's keys and values"
        )
        if select.remark():
            lines.append(f"selector    {select.remark()}")
    if cache.recipe.tier is not None:
        hits, misses, moved = cache.traffic()
        rate = f"hit rate {100 * hits / (hits + misses):.1f} % of {hits + misses:,} runs; " if hits + misses else ""
        place = "; the CPU attends what lives there" if cache.recipe.tier.attend else ""
        lines.append(f"host        {rate}{moved:,} bytes moved to the device{place}")
    return lines


def _heads(cache: Cache) -> str:
    assert cache.table is not None and cache.recipe.heads is not None
    streaming, gate = cache.streaming, cache.table.implied_gate(cache.streaming)
    split = int(cache.managed_layers.sum()) * cache.spec.kv_heads
    text = (
        f"heads       {int(streaming.sum())} of {split} KV heads stream, by {cache.table.source}; the highest gate among "
        f"them is {gate:.3f}"
    )
    return text + ("; above 0.5, so heads that need full attention stream: lower the sparsity" if gate > 0.5 else "")
