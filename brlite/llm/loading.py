"""Loads a model: files, tokenizer, backend, engine. The only file that imports both the engine and the backends."""

from __future__ import annotations

import logging
from array import array
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from brlite.checkpoint.progress import OnProgress, ignore_progress
from brlite.config.options import DEFAULT_MODEL, DEFAULT_MODEL_SAMPLING, Config, LimitsConfig, ModelSpec
from brlite.engine.backend import Backend, close_all
from brlite.engine.engine import Engine
from brlite.engine.logits_processors import load_factories
from brlite.engine.scoring import ScoringHead
from brlite.errors import ConfigError, InvalidRequest, ModelError
from brlite.sampling_params import SamplingParams
from brlite.tokenizer import ChildLimits, Tokenizer, load_tokenizer
from brlite.tokenizer.pair_template import read_pair_template

if TYPE_CHECKING:
    from brlite.checkpoint import Checkpoint
    from brlite.checkpoint.checked_model import CheckedModel

logger = logging.getLogger(__name__)


class Assembly(NamedTuple):
    """A loaded model: the engine decides what to compute, the backend computes it."""

    engine: Engine
    backend: Backend

    @property
    def backends(self) -> list[Backend]:
        """The backend, and that of the draft model if there is one. The owner of the assembly closes them."""
        draft_model = self.engine.draft_model
        return [self.backend] if draft_model is None else [self.backend, draft_model.backend]

    def close(self) -> None:
        """Free a model that is not being served."""
        close_all([self.engine.tokenizer, *self.backends])


def build_engine(config: Config, spec: ModelSpec | None = None, on_progress: OnProgress | None = None) -> Assembly:
    """Load a model of the config, by default the first one. Returns when its weights are loaded. Thread-safe.

    `on_progress` gets the name of a stage and the fraction of it that is done. Raises `ModelError` or `ConfigError`.
    """
    spec = spec or config.model[0]
    factories = load_factories(config.engine.logits_processors)  # first: a model takes minutes to load
    load = _load_builtin if config.engine.name is None else _load_from_contract
    with ExitStack() as unless_loaded:
        parts = load(config, spec, on_progress or ignore_progress, unless_loaded)
        info = parts.backend.info
        for note in info.notes:
            logger.warning("model %s: %s", spec.name, note)
        engine = Engine(
            info,
            parts.tokenizer,
            config.engine,
            config.limits,
            grammar=config.grammar,
            sampling_defaults=parts.sampling_defaults,
            scoring_head=parts.scoring_head,
            draft_backend=parts.draft_backend,
            logits_processors=factories,
        )
        unless_loaded.pop_all()
    if info.can_run_ahead and config.engine.speculation == "auto" and not engine.may_draft:
        logger.info(
            'model %s: only tokens that a grammar forces are drafted; engine.speculation = "on" drafts text, too',
            spec.name,
        )
    return Assembly(engine, parts.backend)


def _sampling_defaults(path: Path, spec: ModelSpec, vocab_size: int) -> dict[str, Any]:
    """The sampling defaults in the model's files, for requests without their own values. Invalid values are left out.

    The files of the default model have none; it gets the values of its model card.
    """
    from brlite.checkpoint.generation_config import read_recommended_sampling

    if spec.generation_config == "none":
        return {}
    recommended, source = read_recommended_sampling(path), "generation config"
    if not recommended and (spec.name, spec.path) == (DEFAULT_MODEL, None):
        recommended, source = dict(DEFAULT_MODEL_SAMPLING), "model card"
    defaults: dict[str, Any] = {}
    for name, value in recommended.items():
        try:
            defaults[name] = getattr(SamplingParams(**{name: value}), name)
        except InvalidRequest as error:
            logger.warning("model %s: its generation config is not used where %s", spec.name, error)
    if defaults.get("top_k", 0) > vocab_size:
        defaults["top_k"] = -1
    if defaults:
        values = ", ".join(f"{name} {value:g}" for name, value in defaults.items())
        logger.info(
            'model %s: sampling defaults of its %s: %s (generation_config = "none" turns them off)',
            spec.name,
            source,
            values,
        )
    return defaults


class ModelParts(NamedTuple):
    """The parts of a model. `sampling_defaults` are those of its files; an engine with its own tokenizer has none."""

    tokenizer: Tokenizer
    backend: Backend
    sampling_defaults: dict[str, Any]
    scoring_head: ScoringHead | None = None
    draft_backend: Backend | None = None


def _load_builtin(config: Config, spec: ModelSpec, report: OnProgress, unless_loaded: ExitStack) -> ModelParts:
    """Load a model with one of brlite's own backends. `unless_loaded` gets what closes the parts."""
    from brlite.backends.choose import load_backend
    from brlite.backends.draft import check_draft, load_draft
    from brlite.backends.sizes import settle_context
    from brlite.backends.torch.device import prepare_environment
    from brlite.checkpoint import open_checkpoint
    from brlite.checkpoint.checked_model import check_model
    from brlite.checkpoint.fetch import locate_model
    from brlite.checkpoint.pooling_config import settle_pooling

    prepare_environment()
    path = locate_model(spec.name, spec.path, report)
    checkpoint = open_checkpoint(path, spec.model_file)
    spec = settle_context(checkpoint, spec, config.engine)
    spec = settle_pooling(path, checkpoint.config, spec)
    # Find errors in the files before reading weights and importing torch.
    model = check_model(checkpoint, spec)
    defaults = _sampling_defaults(path, spec, model.config.vocab_size)
    report("reading the tokenizer", 0.0)
    tokenizer = _load_tokenizer(path, spec, config.limits)
    unless_loaded.callback(tokenizer.close)
    _check_vocabulary(tokenizer, model.config.vocab_size, path)
    check_draft(spec, config.engine, tokenizer)
    scoring_head = make_scoring_head(checkpoint, model, spec, tokenizer)
    backend = load_backend(checkpoint, model, spec, config.engine, report)
    unless_loaded.callback(backend.close)
    draft_backend = load_draft(spec, config.engine, backend.info, report)
    if draft_backend is not None:
        unless_loaded.callback(draft_backend.close)
    return ModelParts(tokenizer, backend, defaults, scoring_head, draft_backend)


def make_scoring_head(
    checkpoint: Checkpoint, model: CheckedModel, spec: ModelSpec, tokenizer: Tokenizer
) -> ScoringHead | None:
    """The head of a model that scores, by its files or by `classifier_from_token`. Raises `ConfigError`.

    The context of the spec must be settled.
    """
    from brlite.checkpoint.scoring_head import read_scoring_head, read_token_head

    found = read_scoring_head(checkpoint, model)
    if found is not None and spec.classifier_from_token:
        raise ConfigError(f"classifier_from_token is set, but {spec.name} has a scoring head of its own")
    if spec.classifier_from_token:
        encoded = [tokenizer.encode_continuation(text) for text in spec.classifier_from_token]
        for text, token_ids in zip(spec.classifier_from_token, encoded, strict=True):
            if len(token_ids) != 1:
                raise ConfigError(f"classifier_from_token: {text!r} must be one token of {spec.name}, not {token_ids}")
        found = read_token_head(checkpoint, model, [token_ids[0] for token_ids in encoded]), True
    if found is None:
        if spec.score_template != "auto":
            raise ConfigError(f"score_template is set, but {spec.name} has no scoring head, nor classifier_from_token")
        return None
    source, own = spec.score_template, checkpoint.config.get("score_template")
    if source == "auto":
        source = "qwen3_reranker" if spec.classifier_from_token == ("no", "yes") else "model" if own else "none"
    logger.info("model %s scores pairs of texts; score_template: %s", spec.name, source)
    template = read_pair_template(source, tokenizer, own)
    num_tokens = len(tokenizer.encode(template.fill("", ""))) if template else 0
    if num_tokens >= spec.build_seq:
        raise ConfigError(
            f"score_template {source} has {num_tokens} tokens without a query and a document; the context of "
            f"{spec.name} has {spec.build_seq} (build_seq)"
        )
    weight, has_sigmoid = found
    return ScoringHead(array("f", weight.tobytes()), has_sigmoid, template)


def refuse_scoring(spec: ModelSpec, engine_name: str) -> None:
    """Raise `ConfigError` where settings of scores are set: engine plugins compute none."""
    if spec.classifier_from_token or spec.score_template != "auto":
        raise ConfigError(f"classifier_from_token and score_template are not for the engine {engine_name}")


def needs_no_folder(engine_name: str) -> bool:
    """Whether an engine plugin brings its own tokenizer: its models have no folder. Raises `ConfigError`."""
    from brlite.backends.plugins.contract import BringsTokenizer
    from brlite.backends.plugins.discovery import make_engine

    return isinstance(make_engine(engine_name), BringsTokenizer)


def _load_from_contract(config: Config, spec: ModelSpec, report: OnProgress, unless_loaded: ExitStack) -> ModelParts:
    """Load a model with an engine plugin. The tokenizer is the plugin's, else the one in the model's folder."""
    from brlite.backends.plugins.contract import BringsTokenizer, with_static_context
    from brlite.backends.plugins.discovery import make_engine
    from brlite.backends.plugins.slot_backend import SlotBackend

    assert config.engine.name is not None  # checked by build_engine
    refuse_scoring(spec, config.engine.name)
    spec = with_static_context(spec)
    engine, path = make_engine(config.engine.name), None
    if isinstance(engine, BringsTokenizer):
        if spec.chat_template is not None:
            logger.warning("model %s: chat_template is not used: the engine brings its tokenizer", spec.name)
        tokenizer = engine.tokenizer()
    else:
        from brlite.checkpoint.fetch import default_sources, locate_model

        path = locate_model(spec.name, spec.path, report, sources=partial(default_sources, is_for_plugin=True))
        tokenizer = _load_tokenizer(path, spec, config.limits)  # first: the engine takes minutes to open
    unless_loaded.callback(tokenizer.close)
    report(f"opening engine {config.engine.name}", 0.0)
    backend = SlotBackend(engine, spec, config.engine)
    unless_loaded.callback(backend.close)
    if path is None:
        return ModelParts(tokenizer, backend, {})
    _check_vocabulary(tokenizer, backend.info.vocab_size, path)
    return ModelParts(tokenizer, backend, _sampling_defaults(path, spec, backend.info.vocab_size))


def _load_tokenizer(path: Path, spec: ModelSpec, limits: LimitsConfig) -> Tokenizer:
    tokenizer = load_tokenizer(
        path,
        chat_template=Path(spec.chat_template) if spec.chat_template else None,
        template_limits=ChildLimits(limits.template_seconds, limits.template_memory_bytes),
        control_tokens_in_text=spec.control_tokens_in_text,
    )
    chat_format = tokenizer.chat_format
    if spec.tool_parser == "auto" and chat_format is not None and not chat_format.capabilities.knows_calls:
        logger.warning(
            "model %s: the format in which its chat template has tool calls is not known; calls are read in Hermes' "
            "format (tool_parser names another)",
            spec.name,
        )
    return tokenizer


def _check_vocabulary(tokenizer: Tokenizer, vocab_size: int, path: Path) -> None:
    highest_end = max(tokenizer.eos_token_ids, default=0)
    for highest, source in ((tokenizer.vocab_size - 1, "the tokenizer has"), (highest_end, "eos_token_id has")):
        if highest >= vocab_size:
            raise ModelError(f"{path}: {source} token ids up to {highest}, the model only up to {vocab_size - 1}")
