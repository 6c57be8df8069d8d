"""Prometheus's text format: read whatever way it may be written, labelled, joined, and refused where it is none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from brlite.proxy.exposition import BadExposition, Label, join, read_exposition, write

OURS = Label.of("upstream", "gpu-1")


def labelled(text: str) -> str:
    """The sample lines of a text once it was read with our label."""
    lines = write(read_exposition(text, OURS)).split("\n")
    return "\n".join(line for line in lines if line and not line.startswith("#"))


def parsed(text: str) -> list[Metric]:
    return list(text_string_to_metric_families(text))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("up 1", 'up{upstream="gpu-1"} 1'),
        ("up{} 1", 'up{upstream="gpu-1"} 1'),
        ('up{a="b"} 1.5e3', 'up{a="b",upstream="gpu-1"} 1.5e3'),
        ('up{a="b",} NaN', 'up{a="b",upstream="gpu-1"} NaN'),
        ('up { a = "b" , c="" }\t+Inf', 'up{a="b",c="",upstream="gpu-1"} +Inf'),
        ('up{a="}, {\\"\\\\"}1', 'up{a="}, {\\"\\\\",upstream="gpu-1"} 1'),
        ('up{a="b"} 1 1700000000000', 'up{a="b",upstream="gpu-1"} 1 1700000000000'),
        ("up 1\r", 'up{upstream="gpu-1"} 1'),
        ('up{a="\u2028"} 1', 'up{a="\u2028",upstream="gpu-1"} 1'),
    ],
)
def test_each_sample_gets_the_label_and_keeps_the_rest(line: str, expected: str) -> None:
    assert labelled(line) == expected


def test_a_label_of_that_name_is_kept_as_an_exported_one() -> None:
    line = 'up{upstream="theirs",exported_upstream="older"} 1'

    assert labelled(line) == 'up{exported_exported_upstream="theirs",exported_upstream="older",upstream="gpu-1"} 1'


def test_a_label_s_value_is_escaped() -> None:
    (family,) = parsed(write(read_exposition("up 1", Label.of("upstream", 'a"b\\c\nd'))))

    assert family.samples[0].labels == {"upstream": 'a"b\\c\nd'}


@pytest.mark.parametrize(
    "line",
    [
        "up",
        "up{",
        'up{a="b} 1',
        'up{a="b" c="d"} 1',
        'up{a="b",a="c"} 1',
        "up one",
        "up 1 2 3",
        "up 1_0",
        "1up 1",
        "<p>",
        '{"a.b"} 1',
        "up{a=b} 1",
        'up 1 # {trace="1"} 2',
        "up1",
        "up\x0b1",
    ],
)
def test_a_line_that_is_no_sample_spoils_the_text(line: str) -> None:
    with pytest.raises(BadExposition, match=r"^line 2 is not a sample: "):
        read_exposition(f"good 1\n{line}")


LINES = st.text() | st.sampled_from(["up 1", 'up{a="b"} 2', "x_total 3", "# TYPE up gauge", "# HELP up About.", ""])


@given(st.lists(LINES).map("\n".join))
def test_whatever_is_read_is_families_or_refused(text: str) -> None:
    try:
        families = read_exposition(text, OURS)
    except BadExposition:
        return
    assert all('upstream="gpu-1"' in sample for family in families.values() for sample in family.samples)


@pytest.mark.parametrize("line", ["up{" + " " * 2**20, 'up{a="' + "\\" * 2**20, "up" + "\t" * 2**20 + "x y z"])
def test_a_long_line_is_refused_in_a_time_that_grows_with_its_length(line: str) -> None:
    with pytest.raises(BadExposition):
        read_exposition(line)


def test_the_samples_of_a_histogram_stay_one_family() -> None:
    registry = CollectorRegistry()
    Histogram("took", "Seconds.", ["kind"], registry=registry).labels("x").observe(0.3)
    Counter("seen", "Times.", registry=registry).inc()
    text = generate_latest(registry).decode()

    again = write(read_exposition(text, OURS))

    before, after = parsed(text), parsed(again)
    assert [(family.name, family.type, family.documentation) for family in after] == [
        (family.name, family.type, family.documentation) for family in before
    ]
    for old, new in zip(before, after, strict=True):
        assert [sample._replace(labels={**sample.labels, "upstream": "gpu-1"}) for sample in old.samples] == new.samples


def test_families_of_one_name_become_one() -> None:
    families = read_exposition("# HELP up Ours.\n# TYPE up gauge\nup 1\n")
    theirs = read_exposition("# HELP up Theirs.\n# TYPE up gauge\nup 0\n# TYPE more counter\nmore 5", OURS)

    left_out = join(families, theirs)

    assert left_out == []
    assert write(families).splitlines() == [
        "# HELP up Ours.",
        "# TYPE up gauge",
        "up 1",
        'up{upstream="gpu-1"} 0',
        "# TYPE more counter",
        'more{upstream="gpu-1"} 5',
    ]


def test_a_family_of_another_type_is_left_out_by_name() -> None:
    families = read_exposition("# TYPE took histogram\ntook_count 1")

    left_out = join(families, read_exposition("# TYPE took gauge\ntook 1", OURS))

    assert left_out == ["took"]
    assert write(families) == "# TYPE took histogram\ntook_count 1\n"


def test_joining_leaves_what_is_added_as_it_was() -> None:
    theirs = read_exposition("more 5", OURS)

    for _ in range(2):
        families = read_exposition("more 1")
        join(families, theirs)

    assert write(theirs) == '# TYPE more untyped\nmore{upstream="gpu-1"} 5\n'


def test_samples_without_a_type_and_comments_are_read_too() -> None:
    families = read_exposition("# a remark\n#\n\nbare 1\n# TYPE odd info\nodd 1\n# EOF")

    assert write(families, ["said"]) == "# said\n# TYPE bare untyped\nbare 1\n# TYPE odd untyped\nodd 1\n"
