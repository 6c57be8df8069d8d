"""JSON to struct: whatever the bytes are, the outcome is the struct or a 400 that names the field."""

from __future__ import annotations

import enum
import json
from typing import Annotated, Any, ClassVar, Literal

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from brlite.config.type_errors import type_info
from brlite.dialects.json_body import BodyDecoder, decode_fields, decode_json, decode_value
from brlite.dialects.object_fields import holds
from brlite.errors import InvalidRequest


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Function(msgspec.Struct):
    name: str


class Tool(msgspec.Struct):
    function: Function


class Message(msgspec.Struct):
    no_effect: ClassVar = ("index",)

    role: Literal["system", "user"]
    content: str | None = None


class TextPart(msgspec.Struct, tag_field="type", tag="text"):
    text: str


class ImagePart(msgspec.Struct, tag_field="type", tag="image_url"):
    image_url: str


class Hosted(msgspec.Struct):
    left_out: ClassVar = ("hosted_",)

    name: str
    type: str = "function"


class Tree(msgspec.Struct):
    tree: Tree | None = None


class Closed(msgspec.Struct, forbid_unknown_fields=True):
    pass


class Ask(msgspec.Struct):
    messages: list[Message]
    n: int = 1
    temperature: float = 1.0
    logit_bias: dict[int, float] = {}
    tools: list[Tool] = []
    parts: list[TextPart | ImagePart] = []
    colour: Colour | None = None
    extra: Any = None
    raw: Annotated[msgspec.Raw, holds(list[Hosted])] = msgspec.Raw(b"[]")
    tree: Tree | None = None
    closed: Closed | None = None


DECODER = msgspec.json.Decoder(Ask)


def refusal(body: bytes) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        decode_json(body, DECODER)
    return caught.value


@pytest.mark.parametrize(
    ("text", "escape", "place"),
    [
        (rb"\ud83d", r"\ud83d", 12),
        (rb"\ud83d\ude00\\ud800 \uD800", r"\uD800", 32),
        (rb"\udc00 and more", r"\udc00", 12),
        (rb"\ud83d\u0041", r"\ud83d", 12),
        (rb"\ud83d, which is followed by more", r"\ud83d", 12),
    ],
)
def test_half_of_a_surrogate_pair_is_said_with_its_place(text: bytes, escape: str, place: int) -> None:
    error = refusal(b'{"messages":"' + text + b'"}')

    assert f"request: {escape} at byte {place + 1} is half of a surrogate pair" in str(error)


@pytest.mark.parametrize("rest", ['","n":1}', '\\u12","n":1}', '"}'])
def test_half_of_a_surrogate_pair_is_found_before_other_fields(rest: str) -> None:
    error = refusal(rb'{"messages":"\ud83d' + rest.encode())

    assert r"\ud83d at byte 13 is half of a surrogate pair" in str(error)


def test_a_body_that_is_cut_behind_half_of_a_pair_is_said_to_be_truncated() -> None:
    assert "truncated" in str(refusal(rb'{"messages":"\ud83d'))


def test_a_good_body_becomes_the_struct() -> None:
    ask = decode_json(b'{"messages":[{"role":"user","content":"hi"}]}', DECODER)

    assert ask.messages[0].content == "hi"


@pytest.mark.parametrize(
    ("body", "param", "code", "message"),
    [
        (b"{}", "messages", "missing_required_parameter", "Missing required parameter: 'messages'."),
        (
            b'{"messages":[],"tools":[{"function":{}}]}',
            "tools[0].function.name",
            "missing_required_parameter",
            "Missing required parameter: 'tools[0].function.name'.",
        ),
        (
            b'{"messages":[{"role":"user","content":5}]}',
            "messages[0].content",
            None,
            "Invalid value for 'messages[0].content': Expected `str | null`, got `int`.",
        ),
        (
            b'{"messages":[{"role":"robot"}]}',
            "messages[0].role",
            None,
            "Invalid value for 'messages[0].role': Invalid enum value 'robot'; allowed: system, user.",
        ),
        (
            b'{"messages":[],"parts":[{"type":"video"}]}',
            "parts[0].type",
            None,
            "Invalid value for 'parts[0].type': Invalid value 'video'; allowed: text, image_url.",
        ),
        (
            b'{"messages":[],"colour":"pink"}',
            "colour",
            None,
            "Invalid value for 'colour': Invalid enum value 'pink'; allowed: red, blue.",
        ),
        (b'{"messages":[],"logit_bias":{"a":1}}', "logit_bias", None, "Expected `int`, got `str`"),
        (b"[]", None, None, "Invalid value for 'body': Expected `object`, got `array`."),
        (b'{"messages":[],"temperature":1e999}', "temperature", None, "Number out of range"),
        (b'{"messages":[],"n":' + b"1" * 10**6 + b"}", "n", None, "Integer value out of range"),
    ],
)
def test_a_bad_field_is_named(body: bytes, param: str | None, code: str | None, message: str) -> None:
    error = refusal(body)

    assert (error.param, error.code) == (param, code)
    assert message in str(error)


def test_the_types_of_a_body_are_read_for_the_first_error_alone() -> None:
    refusal(b'{"messages":[{"role":"robot"}]}')
    before = type_info.cache_info()

    refusal(b'{"messages":[{"role":"robot"}]}')

    after = type_info.cache_info()
    assert (after.misses, after.hits > before.hits) == (before.misses, True)


@pytest.mark.parametrize(
    ("value", "param", "message"),
    [
        (b"5", "parts[1]", "Invalid value for 'parts[1]': Expected `object`, got `int`."),
        (b'{"messages":5}', "parts[1].messages", "Invalid value for 'parts[1].messages': Expected `array`, got `int`."),
        (b"{}", "parts[1].messages", "Missing required parameter: 'parts[1].messages'."),
        (
            b'{"messages":[],"extra":1e999}',
            "parts[1].extra",
            "Invalid value for 'parts[1].extra': Number out of range.",
        ),
        pytest.param(
            b'{"messages":[],"extra":' + b"[" * 10**5 + b"]" * 10**5 + b"}",
            "parts[1]",
            "We could not parse the field parts[1]: it is nested too deeply.",
            id="deep",
        ),
    ],
)
def test_a_value_that_was_left_encoded_is_named_from_the_top_of_the_body(
    value: bytes, param: str, message: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        decode_value(msgspec.Raw(value), DECODER, "parts[1]")

    assert caught.value.param == param
    assert str(caught.value).startswith(message)


def test_an_entry_of_a_list_that_was_left_encoded_has_its_index() -> None:
    with pytest.raises(InvalidRequest) as caught:
        decode_value(msgspec.Raw(b'[{"role":"user"},{}]'), msgspec.json.Decoder(list[Message]), "content")

    assert caught.value.param == "content[1].role"


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"{", id="cut"),
        pytest.param(b'{"messages":[]} x', id="trailing"),
        pytest.param('{"messages":[]}'.encode("utf-16"), id="UTF-16"),
        pytest.param('{"messages":[]}'.encode("utf-16"), id="utf-16"),
        pytest.param(b'{"messages":[],"temperature":NaN}', id="NaN"),
        pytest.param(b'{"messages":[],"temperature":-Infinity}', id="Infinity"),
        pytest.param(b'{"messages":[{"role":"user","content":"\\ud800"}]}', id="half surrogate"),
        pytest.param(b'{"messages":[{"role":"user","content":"\xed\xa0\x80"}]}', id="encoded surrogate"),
        pytest.param(b'{"messages":[{"role":"user","content":"\xff"}]}', id="not UTF-8"),
        pytest.param(b'{"messages":[],"unknown":"\xff"}', id="unknown value not UTF-8"),
        pytest.param(b'{"messages":[],"\xff":1}', id="unknown key not UTF-8"),
        pytest.param(b'{"messages":[],"extra":' + b"[" * 10**5 + b"]" * 10**5 + b"}", id="deep"),
        pytest.param(b'{"messages":[],"unknown":' + b'{"a":' * 10**5, id="deep and unknown"),
    ],
)
def test_what_is_not_json_is_refused_as_a_whole(body: bytes) -> None:
    error = refusal(body)

    assert str(error).startswith("We could not parse the JSON body of your request: ")
    assert (error.param, error.code) == (None, "invalid_json")


@pytest.mark.parametrize("place", [b'"messages":[{"role":"%b"}]', b'"messages":[],"closed":{"%b":1}'])
def test_an_error_quotes_a_part_of_a_long_text(place: bytes) -> None:
    error = refusal(b"{" + place % (b"x'`\\n" * 1000) + b"}")

    assert len(str(error)) < 250
    assert len(error.param or "") < 100
    assert "\n" not in str(error)


def test_text_that_looks_like_a_path_does_not_become_one() -> None:
    error = refusal(b'{"messages":[{"role":"x - at `$.secret`"}]}')

    assert error.param == "messages[0].role"


def outcome_of(body: bytes) -> object:
    """The struct and the unknown fields, or the refusal."""
    try:
        return decode_json(body, DECODER), decode_fields(body)
    except InvalidRequest as error:
        return error


@given(st.binary() | st.text().map(str.encode) | st.recursive(st.none() | st.text(), st.lists).map(msgspec.json.encode))
def test_no_bytes_raise_anything_else(body: bytes) -> None:
    assert isinstance(outcome_of(body), (tuple, InvalidRequest))


@given(key=st.binary(), value=st.binary())
@example(key=b"\xff", value=b"")
@example(key=b"\\ud800", value=b"")
@example(key=b"x", value=b"\xff")
@example(key=b"x", value=b"\\ud800")
def test_an_unknown_field_of_any_bytes_is_warned_of_or_refused(key: bytes, value: bytes) -> None:
    body = b'{"messages":[],"%b":"%b"}' % (key, value)

    outcome = outcome_of(body)

    assert isinstance(outcome, InvalidRequest) or body.decode("utf-8")


def test_the_top_level_fields_stay_encoded() -> None:
    body = b'{"messages":[{"role":"user","name":"ann"}],"best_of":1}'

    fields = {name: bytes(raw) for name, raw in decode_fields(body).items()}

    assert fields == {"messages": b'[{"role":"user","name":"ann"}]', "best_of": b"1"}


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])
def test_a_body_of_known_fields_is_not_searched(monkeypatch: pytest.MonkeyPatch, separators: tuple[str, str]) -> None:
    def never(*args: object) -> Any:
        raise AssertionError("it is searched")

    monkeypatch.setattr("brlite.dialects.object_fields._Search.visit", never)
    body = {
        "messages": [{"role": "user", "content": "é"}],
        "n": 2,
        "extra": {"a": 1},
        "tools": [{"function": {"name": "f"}}],
    }

    ask, others = BodyDecoder(Ask).decode(json.dumps(body, separators=separators, ensure_ascii=False).encode())

    assert (ask.n, others) == (2, {})


def test_fields_that_the_struct_lacks_come_beside_it() -> None:
    ask, others = BodyDecoder(Ask).decode(b'\xef\xbb\xbf{"messages":[],"best_of":1,"n":2,"user":null}\n')

    assert (ask.n, {name: bytes(raw) for name, raw in others.items()}) == (2, {"best_of": b"1", "user": b"null"})


def unknown(body: str) -> list[str]:
    return sorted(BodyDecoder(Ask).decode(body.encode())[1])


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ('{"messages":[{"role":"user","frob":1},{"role":"user","frob":2,"x":3}]}', ["messages[].frob", "messages[].x"]),
        ('{"messages":[],"tools":[{"function":{"name":"f","frob":1}}]}', ["tools[].function.frob"]),
        ('{"messages":[{"role":"user","frob":null}],"frob":null}', ["frob"]),
        ('{"messages":[{"role":"user","index":1}]}', []),
        ('{"messages":[],"parts":[{"type":"text","text":"","image_url":1,"x":1}]}', ["parts[].x"]),
        ('{"messages":[],"extra":{"a":[{"frob":1}]},"logit_bias":{"1":2}}', []),
        ('{"messages":[],"raw":[{"name":"f","frob":1},"text",{"type":"hosted_search","frob":1}]}', ["raw[].frob"]),
        ('{"messages":[],"raw":{"frob":1}}', []),  # no list: what decodes it refuses it
        ('{ "messages" : [ {"role" : "user", "content":"\\"a\\": \\u00e9"} ] }', []),
        ('{"m\\u0065ssages":[],"\\u006e":1}', []),
        ('{"messages":[{"role":"user","fr\\u006fb" : 1,"\\\\":1}]}', ["messages[].\\", "messages[].frob"]),
        ('{"messages":[{"role":"user"' + ',"a":{"role":1}' + '}],"a":1}', ["a", "messages[].a"]),
        ('{"messages":[],"raw":["\\u005c\\":",{"name":"f","frob":1}]}', ["raw[].frob"]),
        ('{"messages":[],"raw":["\\\\\\u0022:",{"name":"f","frob":1}]}', ["raw[].frob"]),
        ('{"messages":[],"raw":["\\u00e9","\\\\:",{"name":"f","frob":1}]}', ["raw[].frob"]),
    ],
)
def test_fields_of_objects_that_no_struct_declares_come_by_their_paths(body: str, expected: list[str]) -> None:
    assert unknown(body) == expected


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ('{"messages":[],"n":1,"n":1}', "n"),
        ('{"messages":[],"n":10,"n":1}', "n"),
        ('{"messages":[],"x":1, "n":1 ,"x":2}', "x"),
        ('{"messages":[],"n":1,"\\u006e":2}', "n"),
        ('{"messages":[{"role":"user","role":"system"}]}', "messages[].role"),
        ('{"messages":[],"tools":[{"function":{"name":"f"},"function":{"name":"g"}}]}', "tools[].function"),
        ('{"messages":[],"raw":[{"name":"f" , "name":"f"}]}', "raw[].name"),
        ('{"messages":[],"extra":"a\\",\\"n\\":1","extra":"a"}', "extra"),
        ('{"messages":[{"role":"user","role":"system"}],"raw":["\\u005c\\":"]}', "messages[].role"),
        ('{"messages":[],"' + "x" * 999 + '":1,"' + "x" * 999 + '":2}', "x" * 64),
    ],
)
def test_a_field_that_an_object_has_twice_is_refused_by_name(body: str, param: str) -> None:
    with pytest.raises(InvalidRequest, match="is given twice in one object") as caught:
        unknown(body)

    assert caught.value.param == param


def test_what_is_free_content_may_have_a_key_twice() -> None:
    assert unknown('{"messages":[],"extra":{"a":1,"a":2}}') == []


def test_the_search_is_bounded() -> None:
    many = '{"role":"user"},' * 16_400 + '{"role":"user","frob":1}'
    deep = '{"messages":[],"tree":' + '{"tree":' * 300 + '{"frob":1}' + "}" * 301

    assert unknown(deep) == []  # what decodes requests refuses this depth
    assert unknown('{"messages":[{"role":"user","frob":1},' + many + "]}") == ["messages[].frob"]
    for body, said in (
        ('{"messages":[' + many + "]}", "more than 32768 fields"),
        ('{"messages":[{"role":"user","frob":null}],"raw":[' + "1," * 32_767 + "1]}", "more than 32768 fields"),
        ('{"messages":[],' + ",".join(f'"x{index}":1' for index in range(1025)) + "}", "must have at most 1024 fields"),
    ):
        with pytest.raises(InvalidRequest, match=said):
            unknown(body)


EXTRAS = [
    *(
        ("role", '"user"'),
        ("content", '"\\u00e9\\":"'),
        ("name", '"f"'),
        ("index", "1"),
        ("frob", '{"a":1,"a":2}'),
        ("frob", "null"),
    ),
    *(("\\u0072ole", '"user"'), ("\u00fc", "[]"), ("\\\\", '"\\\\"')),
]


def objects(name: str, value: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """JSON objects with one field that they must have, and up to three others, in any order, with any space."""
    space = st.sampled_from(["", "", " ", "\n\t"])
    others = st.lists(
        st.sampled_from(EXTRAS).filter(lambda extra: extra[0] != name or name in ("role", "name")), max_size=3
    )

    def written(value: str, others: list[tuple[str, str]], places: Any, a: str, b: str) -> str:
        fields = sorted([(name, value), *others], key=lambda _: places.random())
        return "{" + ",".join(f'{a}"{key}"{b}:{a}{each}{b}' for key, each in fields) + "}"

    return st.builds(written, value, others, st.randoms(use_true_random=False), space, space)


DECLARED: dict[str, Any] = {
    "": {*Ask.__struct_fields__},
    "messages[]": {"role", "content", "index"},
    "tools[]": {"function"},
    "tools[].function": {"name"},
}


def slow_search(body: str) -> list[str] | str:
    """The unknown fields, or the word "twice", found by Python's own parser in all objects that have a struct."""
    found: set[str] = set()

    def visit(pairs: Any, path: str) -> None:
        if isinstance(pairs, list):
            for item in pairs:
                visit(item, f"{path}[]")
        if not isinstance(pairs, tuple) or path not in DECLARED:
            return
        names = [name for name, _ in pairs]
        if len(names) > len(set(names)):
            raise KeyError
        for name, value in pairs:
            place = f"{path}.{name}".lstrip(".")
            if name not in DECLARED[path] and not (path and value is None):
                found.add(place)
            visit(value, place)

    try:
        visit(json.loads(body, object_pairs_hook=tuple), "")
    except KeyError:
        return "twice"
    return sorted(found)


@given(
    message=objects("role", st.just('"user"')),
    tool=objects("function", objects("name", st.just('"f"'))),
    more=st.sampled_from(["", ',"frob":null', ',"raw":["\\u005c\\":"]', ',"extra":{"a":1,"a":2}', ',"n":1,"n":2']),
)
@settings(max_examples=100)
def test_the_search_agrees_with_a_slow_one(message: str, tool: str, more: str) -> None:
    body = f'{{"messages":[{message}],"tools":[{tool}]{more}}}'

    try:
        found: object = unknown(body)
    except InvalidRequest as error:
        found = "twice" if "twice" in str(error) else error

    assert found == slow_search(body)


@given(st.binary() | st.recursive(st.none() | st.text(), st.lists).map(msgspec.json.encode))
@example(b'{"messages":[{"role":"robot"}]}')
@example(b'{"messages":[],"frob":1e999}')
@example(b'{"messages":[],"frob":"\\ud800"}')
@example(b'{"messages":[],"frob":"\xff"}')
def test_both_ways_of_decoding_agree(body: bytes) -> None:
    def outcome(decode: Any) -> Any:
        try:
            return decode()
        except InvalidRequest as error:
            return str(error), error.param, error.code

    expected = outcome(lambda: decode_json(body, DECODER))
    found = outcome(lambda: BodyDecoder(Ask).decode(body)[0])

    assert found == expected or (isinstance(found, tuple) and "is given twice" in found[0])
