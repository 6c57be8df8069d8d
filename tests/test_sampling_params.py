from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from brlite.config.options import LimitsConfig
from brlite.engine.admission import check_limits
from brlite.engine.backend import Batch, SamplingInput, ScheduledSeq
from brlite.errors import InvalidRequest
from brlite.sampling_params import SamplingParams, StructuredOutput, parameters
from brlite.sampling_params.readers import UNREAD_BELOW
from tests.rows import all_rows

INF, NAN = float("inf"), float("nan")
PENALTIES = ("presence_penalty", "frequency_penalty")
UNUSUAL = ("typical_p", "xtc_probability", "xtc_threshold", "dynatemp_range", "dynatemp_exponent")
NUMBERS = (
    *PENALTIES,
    "dry_multiplier",
    "dry_base",
    "repetition_penalty",
    "length_penalty",
    "temperature",
    "top_p",
    "min_p",
    "top_n_sigma",
    *UNUSUAL,
)
TRUTHS = ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens")
COUNTS = ("n", "best_of", "top_k", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs", "seed")

ACCEPTED: dict[str, list[Any]] = {
    "n": [1, 1.0, 10**9, 2**64 - 1],
    "best_of": [None, 1, 2.0, 2**64 - 1],
    "use_beam_search": [False],
    "length_penalty": [1, 1.0],
    "early_stopping": [False],
    "presence_penalty": [0, -1e30, 1e308],
    "frequency_penalty": [0, -1e30, 1e308],
    "repetition_penalty": [1, 5e-324, 1e308],
    "temperature": [0, 0.0, 1e-4, 1e30],
    "top_p": [1, 1.0, 5e-324],
    "top_k": [-1, 0, 1, 40.0, 2**63],
    "min_p": [0, 0.0, 1],
    "top_n_sigma": [0, -1, 0.5, 1e308],
    "typical_p": [1, 0.5, 5e-324],
    "dry_multiplier": [0, 0.8, 1e308],
    "dry_base": [1, 1.75, 1e308],
    "dry_allowed_length": [1, 2.0, 2**63],
    "dry_penalty_last_n": [-1, 0, 64],
    "dry_sequence_breakers": ["x", "", [""], ["a", "b"], [], None],
    "xtc_probability": [0, 0.5, 1],
    "xtc_threshold": [0, 0.1, 1],
    "dynatemp_range": [0, 0.5, 1e308],
    "dynatemp_exponent": [0, 1, 100],
    "seed": [None, -1, 0, 5.0, -(2**63), 2**64 - 1],
    "stop": ["end", "", [""], ["end"], ("a", "b"), [], (), None, "\N{SNOWMAN}"],
    "stop_token_ids": [[], [0], [6.0], (1, 2), {3}, None],
    "stop_tokens_ids": [[], [0], (1, 2), None],
    "include_stop_str_in_output": [True, False],
    "allowed_token_ids": [[], [0], [6.0], (1, 2), None],
    "repeat_last_n": [-1, 0, 64, 6.0, 2**63],
    "bad_words": ["end", "", [""], ("a", "b"), [], None, "\N{SNOWMAN}"],
    "ignore_eos": [True, False],
    "max_tokens": [None, -1, 1, 6.0, 2**63],
    "min_tokens": [0, 16],
    "logit_bias": [{}, None, {0: 100, 1: -100.0}, {"7": 1}],
    "logprobs": [None, 0, 20],
    "prompt_logprobs": [None, 0, 20],
    "skip_special_tokens": [True, False],
    "logits_processors": [
        [],
        None,
        ["name"],
        [len],
        ("name", {"qualname": "other", "args": [1], "kwargs": {"x": 2}}),
        [{"qualname": "other", "args": None}],
    ],
    "structured": [None, StructuredOutput(json_object=True), StructuredOutput(choice=["a"])],
}

REFUSED: dict[str, list[Any]] = {
    "n": [0, -1, None],
    "best_of": [0, -1],
    "use_beam_search": [0, 1, None, "true"],
    "length_penalty": [16.5, -17],
    "early_stopping": [0, 1, None, "always"],
    "presence_penalty": [],
    "frequency_penalty": [],
    "repetition_penalty": [0, -1e-9],
    "temperature": [-1e-9],
    "top_p": [0, -0.1, 1.0000001],
    "top_k": [-2, None],
    "min_p": [-1e-9, 1.0000001],
    "top_n_sigma": [-0.5, -2],
    "typical_p": [0, -1, 1.5],
    "dry_multiplier": [-0.1],
    "dry_base": [0.99],
    "dry_allowed_length": [0, 1.5, True, None],
    "dry_penalty_last_n": [-2, 1.5, True, None],
    "dry_sequence_breakers": [["a", ""], ["a", 1], 7, b"end", {"a": 1}, "\ud800"],
    "xtc_probability": [-0.1, 1.5],
    "xtc_threshold": [-0.1, 1.5],
    "dynatemp_range": [-0.5],
    "dynatemp_exponent": [-1, 101],
    "seed": [-(2**63) - 1, 2**64],
    "stop": [["a", ""], ["a", 1], 7, b"end", {"a": 1}, "\ud800"],
    "stop_token_ids": ["12", ["12"], [1.5], [True], 5, [2**64]],
    "stop_tokens_ids": ["12", ["12"], [1.5], [True], 5],
    "include_stop_str_in_output": [],
    "allowed_token_ids": ["12", ["12"], [1.5], [True], 5, [2**64]],
    "repeat_last_n": [-2, 1.5, True, None],
    "bad_words": [["a", ""], ["a", 1], 7, b"end", {"a": 1}, "\ud800"],
    "ignore_eos": [],
    "max_tokens": [0, -2],
    "min_tokens": [-1, 17, None],
    "logit_bias": [
        {1: 100.5},
        {1: NAN},
        {1: INF},
        {" 1_0": 1},
        {"\u0661": 1},
        {"07": 1},
        {7: 1, "7": 1},
        {1.5: 1},
        {True: 1},
        {1: "1"},
        [1],
        5,
    ],
    "logprobs": [-1],
    "prompt_logprobs": [-1],
    "skip_special_tokens": [],
    "logits_processors": ["name", len, [7], [{"name": "x"}], [{"qualname": "x", "more": 1}], ["name"] * 17],
    "structured": [{}, {"json_object": True}, "a", True],
}
REFUSED_BY_KIND: dict[tuple[str, ...], list[Any]] = {
    NUMBERS: [NAN, INF, -INF, None, "1", True, 10**400, 1j, [1]],
    COUNTS: [1.5, "1", True, NAN, 10**30, [1]],
    TRUTHS: [0, 1, None, "true"],
}


def cases(table: dict[str, list[Any]]) -> list[tuple[str, Any]]:
    return [(name, value) for name, values in table.items() for value in values]


def cases_by_kind() -> list[tuple[str, Any]]:
    return [(name, value) for names, values in REFUSED_BY_KIND.items() for name in names for value in values]


def test_the_tables_of_this_test_know_every_field() -> None:
    fields = {field.name for field in msgspec.structs.fields(SamplingParams)}

    assert set(ACCEPTED) == set(REFUSED) == fields


def test_a_value_at_the_edge_of_its_range_is_accepted() -> None:
    with all_rows() as row:
        for name, value in cases(ACCEPTED):
            with row(name, value):
                assert isinstance(SamplingParams(**{name: value}), SamplingParams)


def test_a_value_out_of_range_or_of_another_type_is_refused_by_name() -> None:
    with all_rows() as row:
        for name, value in cases(REFUSED) + cases_by_kind():
            with row(name, value):
                with pytest.raises(InvalidRequest) as refusal:
                    SamplingParams(**{name: value})

                assert refusal.value.param == name
                assert str(refusal.value).startswith(f"{name} must be ")
                assert len(str(refusal.value)) < 200
                assert str(refusal.value).isprintable()


@pytest.mark.parametrize(
    ("name", "value", "read"),
    [
        ("temperature", 1, 1.0),
        ("temperature", np.float32(0.5), 0.5),
        ("n", np.int64(3), 3),
        ("stop", "end", ("end",)),
        ("stop", "", ()),
        ("top_k", 0, -1),
        ("top_n_sigma", -1, 0.0),
        ("top_k", 40.0, 40),
        ("top_k", 2**30, -1),
        ("seed", -1, None),
        ("seed", 2**32 - 1, None),
        ("max_tokens", -1, None),
        ("max_tokens", 6.0, 6),
        ("stop", ["a", "b"], ("a", "b")),
        ("stop", None, ()),
        ("stop_token_ids", [5, 6, 5], (5, 6)),
        ("logit_bias", {"50256": -100}, {50256: -100.0}),
    ],
)
def test_a_value_is_read_to_the_type_of_its_field(name: str, value: Any, read: Any) -> None:
    params = SamplingParams(**{name: value})

    assert getattr(params, name) == read
    assert type(getattr(params, name)) is type(read)


@pytest.mark.parametrize("value", [1, 2, 40, UNREAD_BELOW - 1])
def test_a_number_that_is_not_read_would_be_the_same_if_it_were(value: int) -> None:
    for name, parameter in parameters().items():
        kind = type(parameter.default)
        if kind in (int, float):
            assert repr(parameter.read(kind(value))) == repr(kind(value)), name


@pytest.mark.parametrize("given", [{"best_of": 4}, {"n": 2}, {"n": 2, "best_of": 3, "length_penalty": -16, "seed": 1}])
def test_a_beam_search_has_as_many_beams_as_answers_to_choose_from(given: dict[str, Any]) -> None:
    params = SamplingParams(use_beam_search=True, temperature=0, early_stopping="never", **given)

    assert params.beam_width == given.get("best_of", given.get("n"))
    assert not params.ranks_answers
    assert params.with_defaults({"top_p": 0.5}, ["top_p"]) is params


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"best_of": 1}, "best_of"),
        ({"best_of": 4, "temperature": 0.5}, "temperature"),
        ({"best_of": 4, "top_p": 0.5}, "top_p"),
        ({"best_of": 4, "top_k": 5}, "top_k"),
        ({"best_of": 4, "repetition_penalty": 1.1}, "repetition_penalty"),
        ({"best_of": 4, "logit_bias": {1: 1}}, "logit_bias"),
        ({"best_of": 4, "bad_words": ["x"]}, "bad_words"),
        ({"best_of": 4, "logits_processors": ["x"]}, "logits_processors"),
        ({"best_of": 4, "structured": StructuredOutput(json_object=True)}, "structured"),
        ({"best_of": 4, "structured": StructuredOutput(choice=("x",), param="guided_choice")}, "guided_choice"),
        ({"use_beam_search": False, "length_penalty": 2}, "length_penalty"),
        ({"use_beam_search": False, "early_stopping": True}, "early_stopping"),
    ],
)
def test_what_a_beam_search_cannot_obey_is_refused_by_name(given: dict[str, Any], name: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        SamplingParams(**{"use_beam_search": True, "temperature": 0, **given})

    assert refusal.value.param == name
    assert str(refusal.value).startswith(f"{name} ")


def test_both_spellings_of_stop_token_ids_add_up() -> None:
    params = SamplingParams(stop_token_ids=(1, 2), stop_tokens_ids=(2, 3))

    assert params.stop_token_ids == (1, 2, 3)
    assert params.stop_tokens_ids == ()


def test_min_tokens_is_free_where_max_tokens_is_open() -> None:
    params = SamplingParams(min_tokens=100, max_tokens=None)

    assert params.min_tokens == 100


def test_a_bias_given_does_not_change_with_the_callers_dictionary() -> None:
    biases = {1: 2.0}
    params = SamplingParams(logit_bias=biases)

    biases[1] = 1e9

    assert params.logit_bias == {1: 2.0}


@pytest.mark.parametrize(("temperature", "is_greedy"), [(0.0, True), (9e-6, True), (1e-5, False), (1.0, False)])
def test_a_temperature_too_small_to_divide_by_is_greedy(temperature: float, is_greedy: bool) -> None:
    params = SamplingParams(temperature=temperature)

    assert params.is_greedy is is_greedy


@pytest.mark.parametrize("name", [*PENALTIES, "repetition_penalty"])
def test_each_penalty_alone_counts_as_penalties(name: str) -> None:
    params = SamplingParams(**{name: 1.5})

    assert params.has_penalties
    assert not SamplingParams().has_penalties


@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [
        ("top_k", 10, 11),
        ("stop_token_ids", (0, 9), (10,)),
        ("stop_token_ids", (0,), (-1,)),
        ("allowed_token_ids", (0, 9), (10,)),
        ("logit_bias", {0: 1.0, 9: 1.0}, {10: 1.0}),
    ],
)
def test_the_vocabulary_bounds_top_k_and_token_ids(name: str, inside: Any, outside: Any) -> None:
    check_limits(SamplingParams(**{name: inside}), LimitsConfig(), 10)

    with pytest.raises(InvalidRequest) as refusal:
        check_limits(SamplingParams(**{name: outside}), LimitsConfig(), 10)

    assert refusal.value.param == name


def test_parameters_and_batches_survive_msgpack() -> None:
    params = SamplingParams(
        n=3, temperature=0.7, top_k=5, seed=2**64 - 1, stop=("a", "é"), stop_tokens_ids=(4,), logit_bias={7: -1.5}
    )
    sampling = SamplingInput(
        params=params, seed=-5, position=9, counted_token_ids=b"\x01\0\0\0", output_counts=b"\0\0\0\0"
    )
    batch = Batch(seqs=[ScheduledSeq(seq_id=1, start=0, token_ids=[1, 2], block_table=[0], sampling=sampling)])

    decoded_params = msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams)
    decoded_batch = msgspec.msgpack.decode(msgspec.msgpack.encode(batch), type=Batch)

    assert decoded_params == params
    assert decoded_batch == batch


def test_parameters_out_of_range_are_refused_in_decoding_too() -> None:
    encoded = msgspec.json.encode({"top_p": 2})

    with pytest.raises(msgspec.ValidationError, match=r"Expected `float` <= 1.0 - at `\$.top_p`"):
        msgspec.json.decode(encoded, type=SamplingParams)


@pytest.mark.parametrize(
    "wish",
    [
        {},
        {"json_object": True, "regex": "a"},
        {"regex": ""},
        {"regex": 3},
        {"choice": [""]},
        {"choice": [1]},
        {"regex": "a", "whitespace_pattern": " "},
        {"grammar": None, "json_schema": None},
    ],
)
def test_structured_output_is_exactly_one_thing(wish: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="guided") as caught:
        StructuredOutput(**wish, param="guided_thing")

    assert caught.value.param == "guided_thing"


def test_a_schema_may_be_an_object_or_its_json() -> None:
    assert StructuredOutput(json_schema={"type": "null"}) == StructuredOutput(json_schema='{"type": "null"}')


@pytest.mark.parametrize("text", ["1e999", "true", '"x"', "-1e9", '[""]', '{"5": 1e3}'])
def test_types_alone_refuse_what_is_out_of_range(text: str) -> None:
    finite = PENALTIES if text == "-1e9" else ()  # a penalty may have any finite value
    with all_rows() as row:
        for name in {*NUMBERS, "stop", "logit_bias", "max_tokens"}.difference(finite):
            with row(name), pytest.raises(msgspec.MsgspecError):
                msgspec.json.decode(f'{{"{name}": {text}}}', type=SamplingParams)


def test_the_table_of_parameters_has_every_field_with_its_range_and_text() -> None:
    table = parameters()

    assert tuple(table) == SamplingParams.__struct_fields__
    assert all(parameter.allowed and parameter.text for parameter in table.values())
    assert {name: parameter.default for name, parameter in table.items()} == msgspec.structs.asdict(SamplingParams())
