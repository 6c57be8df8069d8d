"""The one decoder of the Llama-shaped family, over a flat batch of tokens. Where models differ, the config says how.

Matrices multiply in the parameters' type; norms, rotary positions, the residual stream and logits are float32. Nothing
here waits for the device. It knows no sequences: a `StepPlan` says which cached tokens each row sees.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from brlite.backends.torch.attention import StepPlan, attend
from brlite.backends.torch.kv_cache import KVCache, LayerCache
from brlite.backends.torch.parameters import LayerParameters, Parameters
from brlite.backends.torch.rope import RopeTables, rope_tables, rotate_
from brlite.models.config import ModelConfig


class Decoder:
    """A model ready to run: its config, its parameters and the rotary tables of `max_length` positions."""

    def __init__(self, config: ModelConfig, parameters: Parameters, *, max_length: int) -> None:
        self.config = config
        self.parameters = parameters
        self.dtype = parameters.embedding.dtype
        self.device = parameters.embedding.device
        self._rope = rope_tables(config.rope, max_length, self.device)

    def forward(self, token_ids: Tensor, plan: StepPlan, cache: KVCache) -> Tensor:
        """Compute `token_ids` [T], in the plan's order; store their keys and values; return hidden states [T, H]."""
        if plan.begun_blocks.numel():
            cache.clear(plan.begun_blocks)
        rope = self._rope.at(plan.positions)
        hidden = self.parameters.look_up(token_ids)
        for index, layer in enumerate(self.parameters.layers):
            turn = rope if self.config.rotary_dim(index) else None
            hidden += self._attention(hidden, layer, cache.layers[index], plan, turn, self.config.window(index))
            hidden += self._mlp(hidden, layer)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """The vocabulary's logits [R, V] in float32 for rows [R, H] that `forward` returned."""
        return self.parameters.head(self._norm(hidden, self.parameters.norm)).float()

    def _attention(
        self,
        hidden: Tensor,
        layer: LayerParameters,
        cache: LayerCache,
        plan: StepPlan,
        rope: RopeTables | None,
        window: int | None,
    ) -> Tensor:
        config = self.config
        heads = layer.qkv(self._norm(hidden, layer.attention_norm)).view(len(hidden), -1, config.head_dim)
        query = heads[:, : config.num_heads]
        key, value = heads[:, config.num_heads :].chunk(2, dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            query.copy_(self._norm(query.float(), layer.q_norm))
            key.copy_(self._norm(key.float(), layer.k_norm))
        if rope is not None:
            rotate_(heads[:, : config.num_heads + config.num_kv_heads], rope)
        cache.keys.write(plan.slots, key)
        cache.values.write(plan.slots, value)
        return layer.o(attend(query, cache, plan, window))

    def _mlp(self, hidden: Tensor, layer: LayerParameters) -> Tensor:
        gate, up = layer.gate_up(self._norm(hidden, layer.mlp_norm)).chunk(2, dim=-1)
        return layer.down(functional.silu(gate).mul_(up))

    def _norm(self, hidden: Tensor, weight: Tensor) -> Tensor:
        scale = torch.rsqrt(hidden.square().mean(dim=-1, keepdim=True) + self.config.rms_norm_eps)
        return (hidden * scale).mul_(weight).to(self.dtype)
