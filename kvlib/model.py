"""What kvlib needs to know of a model, read from its configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_REPEATS_KEYS = ("jetmoe",)


@dataclass(frozen=True)
class ModelSpec:
    """Shape of a decoder: layers, query and KV heads, head size, trained positions, vocabulary."""

    family: str
    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    max_positions: int
    vocabulary: int

    @classmethod
    def from_config(cls, config: Any) -> ModelSpec:
        """Read a (text) configuration; raises ValueError naming the family and the reason where kvlib cannot serve it."""
        refuse(config)
        try:
            return cls._read(config)
        except AttributeError as error:  # e.g. attributes that differ per layer
            raise ValueError(f"kvlib does not support the family {config.model_type!r}: {error}") from error

    @classmethod
    def _read(cls, config: Any) -> ModelSpec:
        q_heads = int(config.num_attention_heads)
        kv_heads = int(getattr(config, "num_key_value_heads", None) or q_heads)
        head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // q_heads)
        return cls(
            family=str(config.model_type),
            layers=int(config.num_hidden_layers),
            q_heads=q_heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            max_positions=int(getattr(config, "max_position_embeddings", 0) or 2**20),
            vocabulary=int(config.vocab_size),
        )


def refuse(config: Any) -> None:
    """Raise ValueError for a family whose cache is not keys and values per head at one position per token."""
    family = getattr(config, "model_type", type(config).__name__)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if getattr(config, "is_encoder_decoder", False):
        reason = "it is an encoder-decoder: its cross-attention cache has another life"
    elif getattr(config, "kv_lora_rank", None):
        reason = "it uses multi-head latent attention (MLA): its cache holds latents, not keys and values per head"
    elif isinstance(rope, dict) and "mrope_section" in rope:
        reason = "it uses multimodal rotary positions (M-RoPE): one token has several positions"
    elif family in _REPEATS_KEYS:
        reason = "its layers change keys between the cache and the attention function"
    elif getattr(config, "num_kv_shared_layers", 0):
        reason = f"{config.num_kv_shared_layers} of its layers read another layer's keys and values"
    else:
        return
    raise ValueError(f"kvlib does not support the family {family!r}: {reason}; use a stock cache for it")
