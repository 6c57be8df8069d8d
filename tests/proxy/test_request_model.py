"""What is read of a body and what is changed: whatever else it holds passes, byte for byte, or is refused in words."""

from __future__ import annotations

import json
import sys

import msgspec
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from brlite.dialects.json_body import decode_fields
from brlite.errors import InvalidRequest
from brlite.proxy.request_model import InboundFields, peek, replace_model

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text('model"\\é ,:{'),
    lambda values: (
        st.lists(values, max_size=3) | st.dictionaries(st.sampled_from(["model", "Model", "x"]), values, max_size=3)
    ),
    max_leaves=8,
)
json_texts = st.builds(
    lambda value, is_ascii, indent: json.dumps(value, ensure_ascii=is_ascii, indent=indent).encode(),
    json_values,
    st.booleans(),
    st.none() | st.just(1),
)
spaces = st.text(" \t\r\n", max_size=3).map(str.encode)
other_keys = st.sampled_from([b'"x"', b'"messages"', b'"models"', b'"a\\"model"', rb'"\\model"', '"é"'.encode(), b'""'])


def spell(name: str, escaped: list[bool]) -> bytes:
    """The name as a JSON string, some of its letters escaped."""
    letters = [
        f"\\u{ord(letter):04x}" if is_escaped else letter for letter, is_escaped in zip(name, escaped, strict=True)
    ]
    return f'"{"".join(letters)}"'.encode()


model_keys = st.lists(st.booleans(), min_size=5, max_size=5).map(lambda escaped: spell("model", escaped))


def refusal(body: bytes) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        peek(body)
    return caught.value


def test_the_fields_are_read_wherever_they_stand() -> None:
    body = b'{"messages":[{"model":"no","user":"no"}],"user":"ann","stream":true, "model" : "m"}'

    assert peek(body) == InboundFields(model="m", user="ann")


@pytest.mark.parametrize("body", [b"{}", b'{"model":null,"stream":null,"user":null}', b' {"models":"m","prompt":1}\n'])
def test_what_is_absent_or_null_is_none(body: bytes) -> None:
    assert peek(body) == InboundFields(None, None)


@pytest.mark.parametrize(
    "value",
    [b'"yes"', b"1", b"1e999", b"[[]]", b'{"a":"\\n"}', b"9" * 5000, b"-0.5", b'{"model":1}', b"[" * 500 + b"]" * 500],
)
def test_other_fields_may_hold_anything(value: bytes) -> None:
    body = b'{"model":"m","stream":%b,"user":[%b],"n":%b,"":%b}' % (value, value, value, value)

    assert peek(body) == InboundFields(model="m")


@pytest.mark.parametrize("value", [b"1", b"1e999", b"true", b"[]", b'{"a":"m"}', b'["m"]'])
def test_a_model_that_is_no_name_is_refused(value: bytes) -> None:
    error = refusal(b'{"stream":"yes","model":%b}' % value)

    assert error.param == "model"
    assert "'model'" in str(error)


@given(first=model_keys, second=model_keys, names=st.lists(st.sampled_from([b'"a"', b"null"]), min_size=2, max_size=2))
def test_a_model_that_stands_twice_is_refused_however_it_is_spelt(
    first: bytes, second: bytes, names: list[bytes]
) -> None:
    error = refusal(b'{%b:%b,"messages":[],%b:%b}' % (first, names[0], second, names[1]))

    assert error.param == "model"
    assert "twice" in str(error)


@pytest.mark.parametrize("key", [b"Model", b"MODEL", b"modeL", rb"\u004dodel"])
@pytest.mark.parametrize("before", [b"", b'"model":"a",'])
def test_a_model_in_other_letters_is_refused(key: bytes, before: bytes) -> None:
    error = refusal(b'{%b"%b":"b"}' % (before, key))

    assert str(error.param).lower() == "model"
    assert "must be written 'model'" in str(error)


@pytest.mark.parametrize(
    "body", [b'{"model":"a","tools":[{"model":"b","Model":"c"}]}', rb'{"model":"a","x":"\"model\":\"b\"","y":"model"}']
)
def test_a_model_that_stands_deeper_or_in_a_text_is_another_matter(body: bytes) -> None:
    assert peek(body).model == "a"


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b'{"model":"m"', id="cut"),
        pytest.param(b'{"model":"m"}{', id="trailing"),
        pytest.param('{"model":"m"}'.encode("utf-16"), id="UTF-16"),
        pytest.param(b'{"model":"m","x":NaN}', id="NaN"),
        pytest.param(b'{"model":"m","x":"\xff"}', id="not UTF-8"),
        pytest.param(b'{"model":"\xff"}', id="model not UTF-8"),
        pytest.param(b'{"model":"\\ud800"}', id="half surrogate"),
        pytest.param(b'{"model":"m","x":' + b"[" * 10**5 + b"]" * 10**5 + b"}", id="deep"),
        pytest.param(b'{"model":"m","stream":' + b"[" * 10**5 + b"]" * 10**5 + b"}", id="deep stream"),
        pytest.param(b'{"model":"m","stream":1,"x":' + b'{"a":' * 10**5, id="deep and cut"),
    ],
)
def test_what_is_not_json_is_refused_as_a_whole(body: bytes) -> None:
    error = refusal(body)

    assert str(error).startswith("We could not parse the JSON body of your request: ")
    assert (error.param, error.code) == (None, "invalid_json")


@pytest.mark.parametrize("body", [b"[]", b'"model"', b"null", b"1"])
def test_what_is_no_object_is_refused(body: bytes) -> None:
    assert "Expected `object`" in str(refusal(body))


@given(st.binary() | json_texts)
@example(b'{"model":"a","model"')
def test_no_bytes_raise_anything_else(body: bytes) -> None:
    try:
        model = peek(body).model
    except InvalidRequest:
        return

    assert model == json.loads(body).get("model")


@given(
    before=st.lists(st.tuples(other_keys, json_texts), max_size=3),
    key=model_keys,
    old=st.text().map(json.dumps) | st.text().map(lambda text: json.dumps(text, ensure_ascii=False)),
    after=st.lists(st.tuples(other_keys, json_texts), max_size=3),
    new=st.text(min_size=1),
    space=spaces,
)
@example(before=[(b'"x"', b'{"model":"m"}')], key=b'"model"', old='"m"', after=[], new="n", space=b"")
@example(before=[(b'"x"', b'{"model":"n"}')], key=b'"model"', old='"m"', after=[], new="n", space=b"")
@example(
    before=[(b'"x"', b'{"model":"n"}'), (b'"y"', b"9" * 5000)], key=b'"model"', old='"m"', after=[], new="n", space=b""
)
@example(before=[(b'"a\\"model"', b'"m"')], key=b'"model"', old='"m"', after=[], new="n", space=b"")
def test_only_the_model_changes(
    before: list[tuple[bytes, bytes]],
    key: bytes,
    old: str,
    after: list[tuple[bytes, bytes]],
    new: str,
    space: bytes,
) -> None:
    def body(model: bytes) -> bytes:
        fields = [space.join((b"", name, b":", value, b"")) for name, value in [*before, (key, model), *after]]
        return space.join((b"", b"{", b",".join(fields), b"}", b""))

    assume(json.loads(old) != new)
    name = msgspec.json.encode(new)

    replaced = replace_model(body(old.encode()), new)

    if key == b'"model"' and not any(b'model"' in part for field in before for part in field):
        assert replaced == body(name)
    else:
        assert decode_fields(replaced) == {**decode_fields(body(old.encode())), "model": msgspec.Raw(name)}


@pytest.mark.parametrize("depth", range(900, 1001, 4))
def test_deep_nesting_is_passed_or_refused_at_any_depth(depth: int) -> None:
    body = b'{"x":{"model":"a","y":' + b"[" * depth + b"]" * depth + b'},"model":"a"}'

    outcome = outcome_of(body, "b")

    assert outcome == b'"b"'.join(body.rsplit(b'"a"', 1)) or "nested too deeply" in str(outcome)


def outcome_of(body: bytes, new: str) -> bytes | InvalidRequest:
    """The changed body, or the refusal."""
    try:
        return replace_model(body, new)
    except InvalidRequest as error:
        return error


def test_a_byte_order_mark_is_no_part_of_a_body() -> None:
    body = b'{"messages":[{"role":"user","content":"hi"}],"model":"m"}'
    marked = b"\xef\xbb\xbf" + body

    assert peek(marked) == peek(body)
    assert replace_model(marked, "n") == b"\xef\xbb\xbf" + replace_model(body, "n")


def test_a_model_is_found_behind_a_byte_order_mark_and_a_text_that_looks_like_one() -> None:
    marked = b'\xef\xbb\xbf{"x": {"model": "y"}, "model": "m"}'

    assert replace_model(marked, "n") == b'{"x":{"model": "y"},"model":"n"}'


@pytest.mark.parametrize("inner", [b'"x":[%b]' % b",".join([b'{"model":""}'] * 9999), b",".join([b'"a":1'] * 9999)])
def test_a_model_behind_many_fields_is_replaced_without_a_call_for_each(inner: bytes) -> None:
    body = b'{"tools":[{"model":"a"}],%b,"model":"m"}' % inner
    calls: list[str] = []

    sys.setprofile(lambda frame, event, value: calls.append(event))
    replaced = replace_model(body, "n")
    sys.setprofile(None)

    assert peek(replaced).model == "n"
    assert len(calls) < 100
