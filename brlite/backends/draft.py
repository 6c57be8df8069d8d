"""The draft model of a `[[model]]`: where its files are, how large its cache is, and its backend."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from brlite.backends.choose import load_backend
from brlite.checkpoint import open_checkpoint
from brlite.checkpoint.checked_model import check_model
from brlite.checkpoint.fetch import local_sources, locate_model
from brlite.checkpoint.progress import OnProgress
from brlite.config.options import DraftConfig, EngineConfig, ModelSpec
from brlite.engine.backend import Backend, BackendInfo
from brlite.errors import ConfigError, ModelError
from brlite.models.registry import find_family
from brlite.tokenizer import Tokenizer, load_tokenizer

logger = logging.getLogger(__name__)


def find_draft(draft: DraftConfig) -> Path:
    """The folder or file of a draft model, which is not fetched. Raises `ModelError` where there is none."""
    try:
        return locate_model(draft.path, draft.path, sources=local_sources)
    except ModelError as error:
        raise ModelError(f"draft: {error}") from None


def draft_spec(
    spec: ModelSpec, engine: EngineConfig, hf_config: Mapping[str, Any], served: tuple[int, int]
) -> ModelSpec:
    """The draft model of `spec` as a model of its own. `served` are its context and the tokens of its KV cache.

    The draft model's cache holds `max_draft_seqs` contexts, but no more tokens than the served model's.
    """
    assert spec.draft is not None, "the caller has looked"
    context, num_tokens = served
    build_seq = min(context, find_family(hf_config).read_config(hf_config).max_context)
    build_batch = min(engine.max_draft_seqs, spec.build_batch)
    return ModelSpec(
        name=f"{spec.name} (draft)",
        path=spec.draft.path,
        precision=spec.draft.precision,
        build_seq=build_seq,
        build_batch=build_batch,
        num_blocks=math.ceil(min(build_batch * build_seq, max(num_tokens, build_seq)) / engine.block_size),
        devices=spec.devices[:1],
    )


def check_draft(spec: ModelSpec, engine: EngineConfig, tokenizer: Tokenizer) -> None:
    """Raise `ModelError` if `spec` has a draft model whose files are wrong or whose vocabulary is not `tokenizer`'s."""
    if spec.draft is None or engine.speculation == "off":
        return
    path = find_draft(spec.draft)
    checkpoint = open_checkpoint(path)
    with closing(load_tokenizer(path)) as own:
        of_draft = ModelSpec(name=f"{spec.name} (draft)", precision=spec.draft.precision)
        vocab_size = check_model(checkpoint, of_draft).config.vocab_size
        different = tokenizer.first_difference(own)
        if different is None and tokenizer.vocab_size > vocab_size:
            different = vocab_size
        if different is not None:
            raise ModelError(
                f"{path}: a draft model needs the vocabulary of the model that it drafts for, {spec.name}: token "
                f"{different} is {own.token_bytes(different)!r} here, {tokenizer.token_bytes(different)!r} there"
            )


def refuse_drafts(spec: ModelSpec, engine: EngineConfig, backend: str) -> None:
    """Raise `ConfigError` if a draft model or `speculation` "on" is set, for a backend that cannot verify drafts."""
    if engine.speculation == "on":
        raise ConfigError(
            f'engine.speculation is "on", but the {backend} backend cannot verify drafts: with its operators a '
            "row's bits depend on the other rows"
        )
    if spec.draft is not None and engine.speculation != "off":
        raise ConfigError(
            f"model {spec.name}: draft: the {backend} backend cannot verify drafts; leave out {spec.draft.path}"
        )


def load_draft(spec: ModelSpec, engine: EngineConfig, served: BackendInfo, on_progress: OnProgress) -> Backend | None:
    """The backend of the draft model of `spec`, if it has one that is used.

    Raises `ConfigError` if it has one, or `speculation` is "on", and the backend of the model that is `served` cannot
    verify drafts.
    """
    if not served.verifies_drafts:
        refuse_drafts(spec, engine, served.name)
    if spec.draft is None or engine.speculation == "off":
        return None
    path, sizes = find_draft(spec.draft), (served.max_model_len, served.num_blocks * served.block_size)
    checkpoint = open_checkpoint(path)
    of_draft = draft_spec(spec, engine, checkpoint.config, sizes)
    backend = load_backend(checkpoint, check_model(checkpoint, of_draft), of_draft, engine, on_progress)
    logger.info("model %s: %s drafts for it, on the %s backend", spec.name, path, backend.info.name)
    return backend
