"""The tiny model before training: an ordinary Llama with a retrieval circuit laid into its first two layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

from kvlib.eval.grammar import BOS, EOS, PAD, SIZE

BLOCKED = "blocked_causal"
SLOT = 64  # dimensions of an identity in the residual stream; the size of a head
FAST = 8  # rotary pairs that tell neighbours apart


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; the circuit matches by the rotary pairs that turn less than one radian over `span` tokens."""

    hidden: int = 256
    intermediate: int = 512
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    theta: float = 1e7
    positions: int = 32768
    span: int = 667

    def __post_init__(self):
        if self.hidden <= 3 * SLOT or self.layers < 2 or self.kv_heads < 2 or self.heads < 2 * self.kv_heads:
            raise ValueError(
                f"{self} has no room for the circuit: it takes a hidden size above {3 * SLOT}, two layers, "
                "two KV heads and two query heads for each"
            )


def build(shape: Shape, seed: int) -> LlamaForCausalLM:
    """The model to train, in float32."""
    config = LlamaConfig(
        vocab_size=SIZE,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=SLOT,
        max_position_embeddings=shape.positions,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": shape.theta},
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        lay_circuit(model, shape.span)
    return model


@torch.no_grad()
def lay_circuit(model: LlamaForCausalLM, span: int) -> None:
    """Lay an induction circuit over the random weights; all of it stays trainable.

    Three slots of the residual stream hold identities: the token's own, that of the token before, that of the one before
    it.  The embeddings fill the first.  Their last dimension is a constant, so that a head can look for an offset alone.

    Layer 0, KV head 0: query heads 0 and 1 attend one and two tokens back, by the fast rotary pairs, and copy the identity
    found there into the second and third slot.
    Layer 1, the first query head of KV heads 0 and 1: the token's own identity finds the same one in the second slot and
    copies what followed it then (after `ask K`: the a of `key K a b`); the identity before it finds the same one in the
    third slot and copies (after `K a`: the b).  Matching is by the slow pairs only, lest it fade with the distance.
    """
    config = model.config
    half, group = SLOT // 2, config.num_attention_heads // config.num_key_value_heads
    turn = config.rope_parameters["rope_theta"] ** (-torch.arange(half) / half)  # radians per token of each pair
    (slow,) = (turn * span < 1).nonzero(as_tuple=True)
    slow = torch.cat([slow, slow + half])
    eye = torch.eye(SLOT)
    own, before, twice = (slice(i * SLOT, (i + 1) * SLOT) for i in range(3))

    embedding = model.model.embed_tokens.weight
    embedding.normal_(0, 0.01)
    # Not of one norm, although then the offset heads would be sharp from the start: trained so, the model never learnt to
    # go on to a third name of `list`.
    embedding[:, own].normal_(0, 0.1)
    embedding[:, -1] = 0.57

    def head(weight: nn.Parameter, index: int) -> Tensor:
        return weight[index * SLOT : (index + 1) * SLOT]

    offsets, induction = (layer.self_attn for layer in model.model.layers[:2])
    key, value = (head(projection.weight, 0) for projection in (offsets.k_proj, offsets.v_proj))
    key.normal_(0, 0.005)
    key[:FAST, -1] = 1
    value.zero_()
    value[:, own] = 0.25 * eye
    for index, (offset, target) in enumerate([(1, before), (2, twice)]):
        query = head(offsets.q_proj.weight, index)
        query.normal_(0, 0.005)
        # Turned back by `offset` tokens, the query scores sum_p cos(turn_p * (distance - offset)).
        query[:FAST, -1] = torch.cos(turn[:FAST] * offset)
        query[half : half + FAST, -1] = -torch.sin(turn[:FAST] * offset)
        head(offsets.o_proj.weight.T, index)[:, target] = 0.25 * eye

    for index, (wanted, found) in enumerate([(own, before), (before, twice)]):
        basis = 1.5 * torch.linalg.qr(torch.randn(SLOT, SLOT))[0][: len(slow)]
        head(induction.k_proj.weight, index)[slow, found] = basis
        head(induction.q_proj.weight, index * group)[slow, wanted] = basis
        head(induction.v_proj.weight, index)[:, own] += 0.25 * eye
        head(induction.o_proj.weight.T, index * group)[:, own] += 0.5 * eye


def blocked_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, scaling: float, **_: object
) -> tuple[Tensor, None]:
    """Causal attention by blocks of queries: [B, H, T, D] and [B, KV, T, D] -> [B, T, H, D].

    Training on a CPU in bfloat16 is about twice as fast as with sdpa.  There is no padding and no cache.
    """
    rows, heads, length, size = query.shape
    pairs, group = rows * key.shape[1], heads // key.shape[1]
    block = 64 if length <= 256 else 128
    query = query.reshape(pairs, group, length, size)
    key, value = key.reshape(pairs, length, size).mT, value.reshape(pairs, length, size)
    outs = []
    for start, part in zip(range(0, length, block), query.split(block, 2), strict=True):
        n = part.shape[2]
        bias = part.new_full((n, start + n), -1e4).triu(start + 1).repeat(group, 1)
        asked = part.reshape(pairs, group * n, size)
        scores = torch.baddbmm(bias.expand(pairs, -1, -1), asked, key[:, :, : start + n], alpha=scaling)
        outs.append(torch.bmm(scores.softmax(-1), value[:, : start + n]).view(rows, heads, n, size))
    return torch.cat(outs, 2).transpose(1, 2).contiguous(), None


AttentionInterface.register(BLOCKED, blocked_attention)
