"""The sampling table: every parameter with its default and its range, the same online and offline.

Ranges that depend on the model (top_k and token ids against the vocabulary) are checked by `engine/admission.py`.
The mathematics is in `brlite/backends/sampling/reference.py`.
"""

from __future__ import annotations

import operator
import reprlib
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import compress
from typing import Annotated, Any, Literal, NamedTuple, get_args

import msgspec
from msgspec import Meta, inspect

from brlite.errors import InvalidRequest
from brlite.sampling_params.readers import (
    UNREAD_BELOW,
    read_biases,
    read_integer,
    read_number,
    read_optional_integer,
    read_processors,
    read_seed,
    read_structured,
    read_texts,
    read_token_ids,
    read_top_k,
    read_top_n_sigma,
    read_unless_minus_1,
)
from brlite.sampling_params.structured_output import StructuredOutput

MAX = sys.float_info.max  # as a bound it refuses infinity and NaN
GREEDY_BELOW = 1e-5  # a temperature under this is greedy: dividing logits by it would overflow fp32
MAX_LOGIT_BIAS = 100.0
MAX_LOGITS_PROCESSORS = 16  # each is a Python call for every token
MAX_LENGTH_PENALTY = 16  # a length of millions to this power does not overflow a float
# Parameters that a model's generation_config.json sets if the request does not: vLLM's list, without the length limit.
MODEL_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_REFUSALS = (msgspec.ValidationError, TypeError, ValueError, OverflowError)  # raised for an invalid value

# Parameters that change the allowed tokens or their probabilities. A beam search needs the model's own probabilities.
NOT_IN_BEAM_SEARCH = (
    *("temperature", "top_p", "top_k", "min_p", "top_n_sigma", "typical_p", "xtc_probability", "dynatemp_range"),
    *("dry_multiplier", "presence_penalty", "frequency_penalty", "repetition_penalty"),
    *("logit_bias", "allowed_token_ids", "bad_words", "logits_processors"),
)

Pooling = Literal["last", "mean"]
FinishReason = Literal["stop", "length", "abort", "error"]  # why a completion ended


_TEXTS = "a string or a list of strings that are not empty"
Finite = Annotated[float, Meta(ge=-MAX, le=MAX)]
CountOrNone = Annotated[int, Meta(ge=0)] | None


def _parameter(allowed: str, text: str, *, read: Callable[[Any], Any] | None = None, **bounds: Any) -> Meta:
    """The metadata of a parameter: its range as text, its description, and the bounds that msgspec checks.

    `read` is the reader of its values, unless that follows from the type.
    """
    return Meta(description=text, extra={"allowed": allowed, "read": read}, **bounds)


class PoolingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How a prompt's hidden states become its embedding. Raises `InvalidRequest`, naming the field.

    `pooling` takes the hidden state of the last token or the mean of all; None: the model's default. `dimensions`
    keeps the first numbers of the vector, for models trained for that. With `normalize` it is scaled to length 1.
    """

    pooling: Pooling | None = None
    dimensions: int | None = None
    normalize: bool = True

    def __post_init__(self) -> None:
        if self.pooling is not None and self.pooling not in get_args(Pooling):
            allowed = " or ".join(get_args(Pooling))
            raise InvalidRequest(f"pooling must be {allowed}, got {reprlib.repr(self.pooling)}", param="pooling")
        is_whole = isinstance(self.dimensions, int) and not isinstance(self.dimensions, bool)
        if self.dimensions is not None and not (is_whole and self.dimensions >= 1):
            raise InvalidRequest(
                f"dimensions must be a whole number of at least 1, got {reprlib.repr(self.dimensions)}",
                param="dimensions",
            )


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How to choose the tokens of a completion. Raises `InvalidRequest`, naming the field, when out of range.

    `stop` takes a string or a list; `stop_tokens_ids` is the manual's spelling of `stop_token_ids`, and both add up.
    `max_tokens=None` means half of `build_seq`, or what the context has left if that is less. `logprobs` and
    `prompt_logprobs` count the alternatives reported beside each token (0: only the token itself). Neutral values of
    other front ends are accepted: `top_k=0`, `seed=-1`, `max_tokens=-1`, `stop=""`, 6.0 for 6.
    """

    n: Annotated[int, _parameter("a 64-bit integer, at least 1", "answers to each prompt", ge=1)] = 1
    best_of: Annotated[
        int | None,
        _parameter(
            "a 64-bit integer, at least n",
            "so many answers are made, and the n with the highest mean logprob given; null: n",
        ),
    ] = None
    use_beam_search: Annotated[
        bool,
        _parameter(
            "true or false",
            "the most probable answers, by a search with best_of beams; n of them are given, at their end",
        ),
    ] = False
    length_penalty: Annotated[
        float,
        _parameter(
            f"a number in [-{MAX_LENGTH_PENALTY}, {MAX_LENGTH_PENALTY}]",
            "of a beam search: an answer's logprob is divided by its length to this power; above 0 favours long ones",
            ge=-MAX_LENGTH_PENALTY,
            le=MAX_LENGTH_PENALTY,
        ),
    ] = 1.0
    early_stopping: Annotated[
        bool | Literal["never"],
        _parameter(
            'true, false or "never"',
            "of a beam search: true ends it with best_of answers; false, when the best beam's score as it is is no "
            'better than theirs; "never", when no score that it may still reach is',
        ),
    ] = False
    presence_penalty: Annotated[Finite, _parameter("a finite number", "taken off a token that the answer has")] = 0.0
    frequency_penalty: Annotated[
        Finite, _parameter("a finite number", "taken off a token for each time that the answer has it")
    ] = 0.0
    repetition_penalty: Annotated[
        float,
        _parameter("a finite number above 0", "divides logits of tokens that the text has", gt=0, le=MAX),
    ] = 1.0
    repeat_last_n: Annotated[
        int,
        _parameter(
            "-1 or a 64-bit integer, at least 0",
            "the penalties look at so many last tokens of prompt and answer; -1: at all, 0: at none",
            ge=-1,
        ),
    ] = -1
    temperature: Annotated[
        float, _parameter("a finite number, at least 0", "0 (below 1e-5) is greedy", ge=0, le=MAX)
    ] = 1.0
    top_p: Annotated[
        float, _parameter("a number in (0, 1]", "the fewest best tokens with this share of the probability", gt=0, le=1)
    ] = 1.0
    top_k: Annotated[
        int,
        _parameter(
            "-1, 0 or a 64-bit integer, at least 1",
            "so many best tokens, at most the vocabulary's; -1 and 0: all",
            read=read_top_k,
            ge=-1,
        ),
    ] = -1
    min_p: Annotated[
        float, _parameter("a number in [0, 1]", "tokens with this share of the best one's probability", ge=0, le=1)
    ] = 0.0
    top_n_sigma: Annotated[
        float,
        _parameter(
            "-1 or a finite number, at least 0",
            "tokens whose logit is within so many standard deviations of the best one; -1 and 0: off",
            read=read_top_n_sigma,
            ge=0,
            le=MAX,
        ),
    ] = 0.0
    typical_p: Annotated[
        float,
        _parameter(
            "a number in (0, 1]", "the tokens nearest to the mean surprise that hold this share; 1: off", gt=0, le=1
        ),
    ] = 1.0
    xtc_probability: Annotated[
        float, _parameter("a number in [0, 1]", "the chance that XTC leaves out the top choices; 0: off", ge=0, le=1)
    ] = 0.0
    xtc_threshold: Annotated[
        float,
        _parameter("a number in [0, 1]", "XTC keeps the least of the tokens that are this probable", ge=0, le=1),
    ] = 0.1
    dynatemp_range: Annotated[
        float,
        _parameter(
            "a finite number, at least 0", "the entropy moves the temperature by up to this; 0: off", ge=0, le=MAX
        ),
    ] = 0.0
    dynatemp_exponent: Annotated[
        float, _parameter("a number in [0, 100]", "how the entropy moves the temperature", ge=0, le=100)
    ] = 1.0
    dry_multiplier: Annotated[
        float,
        _parameter(
            "a finite number, at least 0",
            "DRY: what lengthening a repetition costs, times dry_base for each token beyond dry_allowed_length; 0: off",
            ge=0,
            le=MAX,
        ),
    ] = 0.0
    dry_base: Annotated[
        float, _parameter("a finite number, at least 1", "DRY: how fast that grows with the repetition", ge=1, le=MAX)
    ] = 1.75
    dry_allowed_length: Annotated[
        int, _parameter("a 64-bit integer, at least 1", "DRY: shorter repetitions are free", ge=1)
    ] = 2
    dry_penalty_last_n: Annotated[
        int,
        _parameter(
            "-1 or a 64-bit integer, at least 0",
            "DRY looks for repetitions in so many last tokens of prompt and answer; -1: in all, 0: off",
            ge=-1,
        ),
    ] = -1
    dry_sequence_breakers: Annotated[
        tuple[Annotated[str, Meta(min_length=1)], ...],
        _parameter(_TEXTS, "DRY: no repetition goes on behind a token that has one of these texts"),
    ] = ("\n", ":", '"', "*")
    seed: Annotated[
        int | None,
        _parameter(
            "a 64-bit integer", "of the random numbers; the same one gives the same answer; -1: none", read=read_seed
        ),
    ] = None
    stop: Annotated[
        tuple[Annotated[str, Meta(min_length=1)], ...],
        _parameter(_TEXTS, "texts that end an answer"),
    ] = ()
    stop_token_ids: Annotated[tuple[int, ...], _parameter("a list of token ids", "tokens that end an answer")] = ()
    stop_tokens_ids: Annotated[
        tuple[int, ...], _parameter("a list of token ids", "br-vllm-serving's spelling of stop_token_ids")
    ] = ()
    include_stop_str_in_output: Annotated[bool, _parameter("true or false", "whether a stop string is shown")] = False
    ignore_eos: Annotated[bool, _parameter("true or false", "go on after the model's end of text")] = False
    max_tokens: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        _parameter("a 64-bit integer, at least 1", "at most; -1: as many as fit", read=read_unless_minus_1),
    ] = 16
    min_tokens: Annotated[
        int,
        _parameter(
            "a 64-bit integer, at least 0", "no end of text before; a stop string counts if it ends behind them", ge=0
        ),
    ] = 0
    logit_bias: Annotated[
        dict[int, Annotated[float, Meta(ge=-MAX_LOGIT_BIAS, le=MAX_LOGIT_BIAS)]],
        _parameter(
            f"token ids with numbers in [-{MAX_LOGIT_BIAS:g}, {MAX_LOGIT_BIAS:g}]",
            "added to these tokens' logits",
            read=read_biases,
        ),
    ] = {}
    allowed_token_ids: Annotated[
        tuple[int, ...], _parameter("a list of token ids", "no other token is drawn; an empty list: all are allowed")
    ] = ()
    bad_words: Annotated[
        tuple[Annotated[str, Meta(min_length=1)], ...],
        _parameter(_TEXTS, "words that no answer has: the token that would complete one is not drawn"),
    ] = ()
    logprobs: Annotated[
        CountOrNone, _parameter("a 64-bit integer, at least 0", "alternatives reported beside each token")
    ] = None
    prompt_logprobs: Annotated[
        CountOrNone, _parameter("a 64-bit integer, at least 0", "the same for the tokens of the prompt")
    ] = None
    logits_processors: Annotated[
        tuple[Any, ...],
        _parameter(
            f"a list of at most {MAX_LOGITS_PROCESSORS} names, or offline of callables",
            "Python code that edits the logits before each draw; the server's config allows names",
            read=read_processors,
            max_length=MAX_LOGITS_PROCESSORS,
        ),
    ] = ()
    skip_special_tokens: Annotated[bool, _parameter("true or false", "leave control tokens out of the text")] = True
    structured: Annotated[
        StructuredOutput | None,
        _parameter("a StructuredOutput, or null", "what the answer must look like", read=read_structured),
    ] = None

    def __post_init__(self) -> None:
        # Check only values that differ from the default: 3 µs instead of 23. Each `{}` is a new object.
        changed = compress(_NAMES, map(operator.is_not, msgspec.structs.astuple(self), _DEFAULTS))
        given = {name: value for name in changed if (value := getattr(self, name)) != {} or name != "logit_bias"}
        try:
            values = {
                name: value if type(value) is _NUMBERS.get(name) and 0 < value < UNREAD_BELOW else _READ[name](value)
                for name, value in given.items()
            }
            fields = msgspec.convert(values, _FIELDS)
        except _REFUSALS:
            raise _refusal(given) from None
        for name in given:
            msgspec.structs.force_setattr(self, name, getattr(fields, name))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            allowed = f"at most max_tokens, which is {self.max_tokens}"
            raise InvalidRequest(f"min_tokens must be {allowed}, got {self.min_tokens}", param="min_tokens")
        if self.best_of is not None and self.best_of < self.n:
            raise InvalidRequest(f"best_of must be at least n, which is {self.n}, got {self.best_of}", param="best_of")
        if self.use_beam_search or self.length_penalty != 1 or self.early_stopping:
            _check_beam_search(self)
        if self.best_of == self.n:
            msgspec.structs.force_setattr(self, "best_of", None)
        if self.stop_token_ids or self.stop_tokens_ids:
            stop_token_ids = tuple(dict.fromkeys(self.stop_token_ids + self.stop_tokens_ids))
            msgspec.structs.force_setattr(self, "stop_token_ids", stop_token_ids)
            msgspec.structs.force_setattr(self, "stop_tokens_ids", ())

    @property
    def ranks_answers(self) -> bool:
        """Whether more answers are drawn than are returned, so that the best must be chosen at the end."""
        return self.best_of is not None and not self.use_beam_search

    @property
    def beam_width(self) -> int:
        """The number of beams of a beam search."""
        return self.best_of or self.n

    def for_all_answers(self) -> SamplingParams:
        """The parameters to draw all `best_of` answers, with logprobs to rank them. For a beam search, unchanged."""
        if self.use_beam_search:
            return self
        return msgspec.structs.replace(self, n=self.best_of or self.n, best_of=None, logprobs=self.logprobs or 0)

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def has_penalties(self) -> bool:
        """Whether a penalty changes logits."""
        is_neutral = self.presence_penalty == 0 and self.frequency_penalty == 0 and self.repetition_penalty == 1
        return not is_neutral and self.repeat_last_n != 0

    def with_defaults(self, defaults: Mapping[str, Any], unset: Iterable[str]) -> SamplingParams:
        """These parameters, with the model's `defaults` for the names in `unset`.

        A beam search is unchanged: the defaults are for sampling.
        """
        if self.use_beam_search:
            return self
        chosen = {name: defaults[name] for name in unset if name in defaults}
        return msgspec.structs.replace(self, **chosen) if chosen else self


def check_token_ids(token_ids: Collection[int], vocab_size: int, *, param: str) -> None:
    """Raise `InvalidRequest` at the first id outside 0 to `vocab_size` - 1."""
    if not token_ids or (min(token_ids) >= 0 and max(token_ids) < vocab_size):  # no loop: a prompt may have 100,000
        return
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise InvalidRequest(f"{param} holds token id {token_id}; allowed are 0 to {vocab_size - 1}", param=param)


def _check_beam_search(params: SamplingParams) -> None:
    """Raise `InvalidRequest` if parameters of a beam search conflict. The rules are vLLM 0.4's."""
    if not params.use_beam_search:
        name = "early_stopping" if params.early_stopping else "length_penalty"
        raise InvalidRequest(f"{name} needs use_beam_search to be true", param=name)
    if params.beam_width < 2:
        message = f"best_of must be at least 2 with use_beam_search: the number of beams, got {params.beam_width}"
        raise InvalidRequest(message, param="best_of")
    if params.structured is not None:
        name = params.structured.param  # the client's field name
        raise InvalidRequest(f"{name} must be left out with use_beam_search", param=name)
    for name in NOT_IN_BEAM_SEARCH:
        value = getattr(params, name)
        neutral = 0.0 if name == "temperature" else _PARAMETERS[name].default
        if value != neutral and not (name == "temperature" and params.is_greedy):
            allowed = f"{neutral:g}" if isinstance(neutral, (int, float)) else "left out"
            message = f"{name} must be {allowed} with use_beam_search, got {reprlib.repr(value)}"
            raise InvalidRequest(message, param=name)


class SamplingParameter(NamedTuple):
    """A sampling parameter: its type with its bounds, its range as text, its default, its description, its reader."""

    name: str
    type: Any
    allowed: str
    default: Any
    text: str
    read: Callable[[Any], Any]


def parameters() -> dict[str, SamplingParameter]:
    """The sampling table by name. Checks and docs are made from it."""
    return dict(_PARAMETERS)


def _refusal(given: dict[str, Any]) -> InvalidRequest:
    """The error for the first value that is out of its range, which one of them is."""
    name, value = next((name, value) for name, value in given.items() if not _is_allowed(name, value))
    if name == "logit_bias" and isinstance(value, Mapping):  # show the first wrong entry
        value = next(({key: bias} for key, bias in value.items() if not _is_allowed(name, {key: bias})), value)
    return InvalidRequest(f"{name} must be {_PARAMETERS[name].allowed}, got {reprlib.repr(value)}", param=name)


def _is_allowed(name: str, value: Any) -> bool:
    try:
        msgspec.convert({name: _READ[name](value)}, _FIELDS)
    except _REFUSALS:
        return False
    return True


def _reader_of(kind: inspect.Type) -> Callable[[Any], Any]:
    """The usual reader of a type's values. Truth values are given as they are."""
    if isinstance(kind, inspect.VarTupleType):
        return read_texts if isinstance(kind.item_type, inspect.StrType) else read_token_ids
    if isinstance(kind, inspect.UnionType) and not kind.includes_none:  # true, false or a word
        return lambda value: value
    readers: dict[type[inspect.Type], Callable[[Any], Any]] = {
        inspect.IntType: read_integer,
        inspect.FloatType: read_number,
        inspect.UnionType: read_optional_integer,
    }
    return readers.get(type(kind), lambda value: value)


_PARAMETERS: dict[str, SamplingParameter] = {}
for _field in msgspec.structs.fields(SamplingParams):
    _info = inspect.type_info(_field.type)
    assert isinstance(_info, inspect.Metadata)  # each field has a `_parameter`
    _PARAMETERS[_field.name] = SamplingParameter(
        name=_field.name,
        type=_field.type,
        allowed=(_info.extra or {})["allowed"],
        default={} if _field.default is msgspec.NODEFAULT else _field.default,
        text=(_info.extra_json_schema or {})["description"],
        read=(_info.extra or {})["read"] or _reader_of(_info.type),
    )
_NAMES = tuple(_PARAMETERS)
_READ = {parameter.name: parameter.read for parameter in _PARAMETERS.values()}
_NUMBERS = {name: type(each.default) for name, each in _PARAMETERS.items() if type(each.default) in (int, float)}
_DEFAULTS = [parameter.default for parameter in _PARAMETERS.values()]
# The same fields without `__post_init__`, so that one call checks all given values.
_FIELDS = msgspec.defstruct(
    "_FIELDS", [(each.name, each.type, msgspec.field(default=None)) for each in _PARAMETERS.values()]
)
