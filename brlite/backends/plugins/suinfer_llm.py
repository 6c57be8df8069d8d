"""A template for suinfer-llm, the closed engine of the manual. It refuses to run: its API is not public.

Nothing below calls or imitates it. With the SDK, copy this file into a package of your own, fill in the four methods
and register the class there under another name, for example `my_suinfer` (`contract.py` shows how). `toy.py` is a
working engine of the same kind, with a static batch. Then

    brlite engine-check --engine my_suinfer --config qwen1.5_14b.json

checks the promises of the contract, and `brlite serve --engine my_suinfer qwen1.5_14b.json` serves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from brlite.backends.plugins.contract import Capabilities, Logits, PluginRow
from brlite.config.options import EngineConfig, ModelSpec
from brlite.errors import ConfigError


class SuinferLlm:
    """Fill this in from the SDK's documents; there are no public sources for any of the points below."""

    def open(self, spec: ModelSpec, config: EngineConfig) -> Capabilities:
        """Build the engine, or load the serialised one, and keep its handle.

        The manual's fields have these names:

        * `model_file` → `spec.model_file`: the traced .pt, to be handed to the builder.
        * `input_name`, `output_name` → the same: the tensors of its graph; `brlite inspect FILE.pt` shows them.
        * `serialize_file` → `spec.serialize_file`: built once and written there, read from there the next time. The
          SDK decides when such a file is out of date (another driver, card or SDK).
        * `model_precision` → `spec.precision`; `build_seq`, `build_batch` → the same: the static shapes.
        * `distribute_param` [tp, 1, 1] → `spec.tensor_parallel`; `devices` → the same. If it starts processes of its
          own, `close` has to end them.
        * `vocab_size` → `spec.vocab_size`: the width of the logits.
        * `cached_dir` → `spec.path`: where brlite reads the tokenizer from; this engine does not need it.

        To find out for the capabilities: whether prompts are a plan of their own, [batch, build_seq] and padded
        (`needs_every_slot`, and neither `can_mix_rows` nor `can_chunk_prompts`), and whether one slot can be filled
        while others keep what they hold (if not, this contract cannot be kept).
        """
        _refuse()

    def step(self, rows: Sequence[PluginRow]) -> Logits:
        """Bind the rows' tokens, run, and return the logits of each row's last token.

        To find out: how a slot and its position are addressed; the types of ids and logits (int32 or int64, float32 or
        bfloat16, which numpy lacks: widen it); whether the plan gives the logits of all positions or of the last.
        """
        _refuse()

    def release(self, slot: int) -> None:
        """To find out: whether a slot can be reset by itself. If the next prompt overwrites it, do nothing."""
        _refuse()

    def close(self) -> None:
        """Release the engine, its memory and its processes. There is nothing to release yet."""


def _refuse() -> NoReturn:
    raise ConfigError(
        "engine suinfer_llm is a template without the vendor's SDK: copy backends/plugins/suinfer_llm.py, fill in "
        "open, step, release and close, and register it under a name of your own (entry point group brlite.engines)"
    )
