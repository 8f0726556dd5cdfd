"""From mappings to dataclasses: conversions, refusals and their messages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from loftq_exp.config.schema import build, dotted_names, nearest, setting
from loftq_exp.errors import UserError


@dataclass(frozen=True)
class Inner:
    count: int = setting("a whole number", 1, ge=1, lt=100, shapes=())
    share: float = setting("a share", 0.5, gt=0, shapes=())
    colour: str = setting("a colour", "red", choices=("red", "green"), shapes=())


@dataclass(frozen=True)
class Outer:
    inner: Inner
    name: str = setting("required", shapes=())
    flag: bool = setting("a switch", False, shapes=())
    maybe: float | None = setting("a number or nothing", None, gt=0, shapes=())
    steps: tuple[str, ...] = setting("a list", ("a", "b"), choices=("a", "b", "c"), shapes=())
    named: Mapping[str, float] | None = setting("numbers by name", None, shapes=())


def built(**values: Any) -> Outer:
    return build(Outer, {"inner": {}, "name": "x"} | values)


def refused(**values: Any) -> str:
    with pytest.raises(UserError) as caught:
        built(**values)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_defaults_fill_what_is_not_given() -> None:
    assert built() == Outer(Inner(1, 0.5, "red"), "x", False, None, ("a", "b"))


@pytest.mark.parametrize(("given", "kept"), [(3, 3), (3.0, 3), ("3", 3), ("0x", None), (3.5, None), (True, None),
                                             (None, None), ([3], None), ("three", None), (float("nan"), None)])  # fmt: skip
def test_whole_numbers(given: Any, kept: int | None) -> None:
    if kept is None:
        shown = "null" if given is None else given
        message = f"inner.count={shown}: a whole number is needed; give inner.count=VALUE"
        assert refused(inner={"count": given}) == message
    else:
        count = built(inner={"count": given}).inner.count
        assert count == kept
        assert type(count) is int


@pytest.mark.parametrize(("given", "kept"), [(3, 3.0), (0.25, 0.25), ("1e-4", 1e-4), (float("inf"), None),
                                             (float("nan"), None), ("nan", None), (False, None), (10**400, None)])  # fmt: skip
def test_numbers(given: Any, kept: float | None) -> None:
    if kept is None:
        assert "a finite number is needed" in refused(inner={"share": given})
    else:
        share = built(inner={"share": given}).inner.share
        assert share == kept
        assert type(share) is float


def test_whole_numbers_beyond_a_floats_53_bits_stay_exact() -> None:
    @dataclass(frozen=True)
    class Wide:
        seed: int = setting("any", shapes=())

    assert build(Wide, {"seed": 2**63 + 1}).seed == 2**63 + 1
    assert build(Wide, {"seed": str(2**63 + 1)}).seed == 2**63 + 1


def test_texts_switches_and_lists() -> None:
    assert built(name=7).name == "7"
    assert "a text is needed" in refused(name=None)
    assert "a text is needed" in refused(name=True)
    assert built(flag=True).flag is True
    assert refused(flag="yes") == "flag=yes: true or false is needed; give flag=VALUE"
    assert "true or false" in refused(flag=1)
    assert built(steps=["c", "a"]).steps == ("c", "a")
    assert refused(steps="a") == "steps=a: a list is needed; give steps=[A,B]"
    assert "a text is needed" in refused(steps=[["a"]])


def test_none_only_where_it_is_meant() -> None:
    assert built(maybe=None).maybe is None
    assert built(maybe=2).maybe == 2.0
    assert "flag=null: true or false is needed" in refused(flag=None)


@pytest.mark.parametrize(("values", "message"), [
    ({"count": 0}, "inner.count=0: out of range; give a value at least 1"),
    ({"count": 100}, "inner.count=100: out of range; give a value less than 100"),
    ({"share": 0}, "inner.share=0.0: out of range; give a value greater than 0"),
    ({"colour": "gren"}, "inner.colour=gren: not a choice (did you mean 'green'?); choose from: red, green"),
    ({"colour": "blue"}, "inner.colour=blue: not a choice; choose from: red, green"),
])  # fmt: skip
def test_ranges_and_choices(values: dict[str, Any], message: str) -> None:
    assert refused(inner=values) == message


def test_a_list_is_checked_item_by_item() -> None:
    assert refused(steps=["a", "d"]) == "steps=d: not a choice; choose from: a, b, c"


def test_large_bounds_are_written_out() -> None:
    @dataclass(frozen=True)
    class Bounded:
        seed: int = setting("any", 0, lt=2**32, shapes=())

    with pytest.raises(UserError, match=r"less than 4294967296$"):
        build(Bounded, {"seed": 2**32})


def test_numbers_by_name() -> None:
    assert built(named={"f1": "93.6", "accuracy": 90}).named == {"f1": 93.6, "accuracy": 90.0}
    assert built(named={}).named == {}
    assert built(named=None).named is None
    assert refused(named=35.0) == "named=35.0: names with their values are needed; give named={NAME:VALUE}"
    assert refused(named={"f1": "high"}) == "named.f1=high: a finite number is needed; give named.f1=VALUE"
    assert refused(named={"f1": None}) == "named.f1=null: a finite number is needed; give named.f1=VALUE"


def test_unknown_keys_get_the_nearest() -> None:
    assert refused(inner={"cont": 1}) == "inner.cont: there is no such setting; did you mean 'count'?"
    expected = "zzz: there is no such setting; choose from: inner, name, flag, maybe, steps, named"
    assert refused(zzz=1) == expected
    with pytest.raises(UserError, match="7: there is no such setting"):
        build(Outer, {7: 1})  # type: ignore[dict-item]


def test_missing_values_and_groups_that_are_values() -> None:
    with pytest.raises(UserError, match="name: no value is set and there is no default; give name=VALUE"):
        build(Outer, {"inner": {}})
    assert refused(inner=3) == "inner=3: this is a group of settings, not a value; set inner.NAME=VALUE"


def test_a_value_of_several_lines_makes_one_line() -> None:
    assert "inner.colour=a b: not a choice" in refused(inner={"colour": "a\nb"})


def test_names() -> None:
    assert list(dotted_names(Outer)) == [
        "inner.count", "inner.share", "inner.colour", "name", "flag", "maybe", "steps", "named",
    ]  # fmt: skip
    assert nearest("nmae", ["name", "flag"]) == "did you mean 'name'?"
    assert nearest("zzz", ["name", "flag"]) == "choose from: name, flag"
