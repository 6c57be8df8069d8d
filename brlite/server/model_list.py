"""What `/v1/models`, `/ready`, `/props` and `/slots` show of models, local and remote ones. Forwards no requests."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any, Literal

from msgspec import UNSET, Struct, UnsetType, structs

import brlite
from brlite.engine.admission import context_length
from brlite.engine.async_engine import EngineLoop
from brlite.errors import ModelNotFound
from brlite.sampling_params import SamplingParams
from brlite.server.served_model import RemoteModel, ServedModel

LATEST = 253402300799  # the last second of the year 9999, the last that RFC 3339 can express


class ModelCard(Struct, kw_only=True):
    """A model in OpenAI's format, with Anthropic's fields added: `type`, `display_name`, `created_at`."""

    id: str
    object: Literal["model"] = "model"
    type: Literal["model"] = "model"
    display_name: str = ""
    created: int
    created_at: str = ""
    owned_by: str = "brlite"
    root: str
    parent: str | None = None
    max_model_len: int | UnsetType = UNSET
    status: str

    def __post_init__(self) -> None:
        self.display_name = self.id
        seconds = min(max(self.created, 0), LATEST)  # another server may send any number
        self.created_at = datetime.fromtimestamp(seconds, timezone.utc).isoformat()


class DefaultSettings(Struct):
    """`n_ctx` is the maximum length of a sequence in tokens, `params` the defaults of the sampling parameters."""

    n_ctx: int
    params: dict[str, Any]


class Modalities(Struct, frozen=True):
    vision: bool = False
    audio: bool = False


class ModelProps(Struct, kw_only=True):
    """A model in the format of llama.cpp's `/props`. Without a file path: clients do not need it."""

    default_generation_settings: DefaultSettings
    total_slots: int
    model_alias: str
    chat_template: str | None
    bos_token: str | None
    eos_token: str | None
    modalities: Modalities = Modalities()
    build_info: str


class NextToken(Struct):
    """The progress of an answer: how many tokens it may still get, and how many it has. An embedding has none."""

    has_next_token: bool
    n_remain: int
    n_decoded: int


class SlotState(Struct, kw_only=True):
    """A slot of the batch in the format of llama.cpp's `/slots`, without prompt and parameters.

    If a sequence uses the slot, `id_task` is the sequence's number. The token counts of its prompt are: all tokens,
    tokens computed or found in the cache, tokens found in the cache.
    """

    id: int
    n_ctx: int
    speculative: bool
    is_processing: bool
    id_task: int | UnsetType = UNSET
    n_prompt_tokens: int | UnsetType = UNSET
    n_prompt_tokens_processed: int | UnsetType = UNSET
    n_prompt_tokens_cache: int | UnsetType = UNSET
    next_token: list[NextToken] | UnsetType = UNSET


class ModelList(Struct, kw_only=True):
    """All models on one page, with OpenAI's and Anthropic's fields."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool = False

    def __post_init__(self) -> None:
        if self.data:
            self.first_id, self.last_id = self.data[0].id, self.data[-1].id


def local_card(name: str, model: ServedModel) -> ModelCard:
    """The `/v1/models` entry of a local model under one of its names."""
    return ModelCard(
        id=name,
        created=model.created,
        root=model.name,
        max_model_len=model.max_model_len or UNSET,
        status=model.status,
    )


def forwarded_card(model: RemoteModel) -> ModelCard:
    """The `/v1/models` entry of a remote model. Raises `ModelNotFound` if no upstream is reachable now."""
    if not model.num_available:
        text = f"The model `{model.name}` cannot be reached now: no server that has it answers"
        raise ModelNotFound(text, param="model", code="model_not_found")
    return ModelCard(
        id=model.name,
        created=model.created,
        owned_by=model.owned_by or "brlite",
        root=model.model,
        max_model_len=UNSET if model.max_model_len is None else model.max_model_len,
        status="ready",
    )


def local_progress(model: ServedModel) -> dict[str, object]:
    """The `/ready` entry of a local model."""
    shown: dict[str, object] = {"model": model.name, "status": model.status}
    if model.status == "loading":
        shown |= {"stage": model.loading.stage, "progress": round(model.loading.fraction, 3)}
    if model.engine is not None and model.engine.has_failed_draft_model:
        shown["draft_model"] = "failed"
    return shown


def forwarded_progress(model: RemoteModel) -> dict[str, object]:
    """The `/ready` entry of a remote model."""
    return {"model": model.name, "upstreams": model.num_upstreams, "available": model.num_available}


def model_props(model: ServedModel, engine: EngineLoop) -> ModelProps:
    """The `/props` response for a loaded model."""
    tokenizer = engine.tokenizer
    bos, eos = tokenizer.bos_token_id, next(iter(tokenizer.eos_token_ids), None)
    return ModelProps(
        default_generation_settings=DefaultSettings(
            context_length(engine.info), structs.asdict(SamplingParams(**engine.sampling_defaults))
        ),
        total_slots=engine.info.max_num_seqs,
        model_alias=model.name,
        chat_template=tokenizer.chat_template_text,
        bos_token=None if bos is None else tokenizer.token_text(bos),
        eos_token=None if eos is None else tokenizer.token_text(eos),
        build_info=f"brlite {brlite.__version__}",
    )


def model_slots(engine: EngineLoop) -> list[SlotState]:
    """The `/slots` response for a loaded model: as many slots as a step has sequences at most, used ones first.

    Sequences have no fixed slots: `id` is the index in this list.
    """
    info, n_ctx = engine.info, context_length(engine.info)
    speculative = engine.may_draft
    slots = [
        SlotState(
            id=number,
            n_ctx=n_ctx,
            speculative=speculative,
            is_processing=True,
            id_task=seq.seq_id,
            n_prompt_tokens=seq.num_prompt_tokens,
            n_prompt_tokens_processed=min(seq.num_computed_tokens, seq.num_prompt_tokens),
            n_prompt_tokens_cache=seq.state.output.num_cached_tokens,
            next_token=[
                NextToken(
                    has_next_token=seq.state.pooling is None,
                    n_remain=seq.state.max_tokens - seq.num_output_tokens,
                    n_decoded=seq.num_output_tokens,
                )
            ],
        )
        for number, seq in enumerate(engine.running)
    ]
    idle = range(len(slots), info.max_num_seqs)
    return slots + [SlotState(id=number, n_ctx=n_ctx, speculative=speculative, is_processing=False) for number in idle]
