"""Validation: from a plain mapping to a frozen dataclass.

A dataclass declares its fields with `setting`, which holds each field's meaning and range. `build` turns a mapping (the
composed configuration) into an instance. An unknown key is an error that names the nearest valid key. Values are converted
only if the conversion is lossless. Every error is one `UserError` line.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import math
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar, cast

from loftq_exp.errors import UserError
from loftq_exp.masking import masked

log = logging.getLogger(__name__)

T = TypeVar("T")
_MISSING = dataclasses.MISSING

INITIALISATION, ADAPTER, SCORES = "initialisation", "adapter", "scores"
LONGEST = 1_000_000
"""The longest sequence that a setting may ask for, in tokens; also the most rows that are drawn or generated. Far above what any
model reads, it refuses a slip of the keyboard before memory is taken for it."""
RESULTS = (INITIALISATION, ADAPTER, SCORES)
"""The three results of a run. Each has a key, a digest of exactly what shapes it."""


def setting(
    doc: str,
    default: Any = _MISSING,
    *,
    shapes: tuple[str, ...],
    choices: tuple[Any, ...] | None = None,
    ge: float | None = None,
    gt: float | None = None,
    lt: float | None = None,
    locates: tuple[str, ...] = (),
    before: Any = None,
) -> Any:
    """A dataclass field with its meaning (`doc`) and its allowed values: `choices`, lower bounds `ge`, `gt`, upper bound `lt`.

    `shapes` names the RESULTS that change with the value. It is empty for a setting that changes none of them. It is also
    empty for a location, because the content there is part of the key. If that content is rows of data, `locates` names the
    RESULTS made from them. `before` is the value that results had before the setting existed, for one that was added later.
    """
    metadata = {"doc": doc, "shapes": shapes, "choices": choices, "ge": ge, "gt": gt, "lt": lt, "locates": locates,
                "before": before}  # fmt: skip
    return dataclasses.field(default=default, metadata=metadata)


def nearest(name: str, valid: typing.Iterable[str]) -> str:
    """Return "did you mean 'x'?" with the valid name nearest to `name`, or the list of valid names if none is near."""
    valid = list(valid)
    found = difflib.get_close_matches(name, valid, n=1, cutoff=0.6)
    return f"did you mean '{found[0]}'?" if found else f"choose from: {', '.join(valid)}"


def build(cls: type[T], values: Mapping[str, Any], prefix: str = "") -> T:
    """Return an instance of the dataclass `cls` from `values`, with every key, type and range checked.

    `prefix` is the dotted path of `cls` inside the configuration, for messages ("quant." for `quant.bits`). If `cls` has
    variants, the key `kind` selects one. Raises UserError for an unknown key, a missing value, a wrong type or a value out
    of range.
    """
    if has_variants(cls):
        variant, own = _variant(cls, values, prefix)
        return build(variant, own, prefix)
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise UserError(f"{prefix}{key}: there is no such setting; {nearest(str(key), fields)}")
    kwargs = {}
    for name, field in fields.items():
        path = prefix + name
        if name not in values:
            if field.default is _MISSING and field.default_factory is _MISSING:
                raise UserError(f"{path}: no value is set and there is no default; give {path}=VALUE")
            continue
        if dataclasses.is_dataclass(hints[name]):
            if not isinstance(values[name], Mapping):
                raise UserError(
                    f"{path}={values[name]}: this is a group of settings, not a value; set {path}.NAME=VALUE"
                )
            kwargs[name] = build(hints[name], values[name], path + ".")
        else:
            kwargs[name] = _checked(path, values[name], hints[name], field.metadata)
    return cls(**kwargs)


def has_variants(cls: Any) -> bool:
    """Return whether `cls` has variants: its `variants()` maps each value of the key `kind` to a dataclass."""
    return isinstance(cls, type) and "variants" in vars(cls)


def _variant(cls: type[T], values: Mapping[str, Any], prefix: str) -> tuple[type[T], dict[str, Any]]:
    """Return the variant of `cls` that `values["kind"]` selects, and the entries of `values` that it declares.

    A setting that only other variants declare is dropped with a warning, because a sweep over variants may set it for all.
    """
    if hasattr(cls, "prepare"):
        cast("Any", cls).prepare(values)
    variants: Mapping[str, type[T]] = cast("Any", cls).variants()
    if "kind" not in values:
        raise UserError(f"{prefix}kind: no value is set and there is no default; give {prefix}kind=VALUE")
    kind = _checked(f"{prefix}kind", values["kind"], str, {"choices": tuple(variants)})
    names = {each: [f.name for f in dataclasses.fields(variant)] for each, variant in variants.items()}  # type: ignore[arg-type]
    known = {name for own in names.values() for name in own}
    for key in values:
        if key not in known:
            raise UserError(f"{prefix}{key}: there is no such setting; {nearest(str(key), [*names[kind], *known])}")
    unused = [key for key in values if key not in names[kind]]
    if unused:
        given = ", ".join(f"{prefix}{key}={values[key]}" for key in unused)
        log.warning("%s: not used by %s %s", given, prefix.rstrip("."), kind)
    return variants[kind], {key: value for key, value in values.items() if key not in unused}


def dotted_names(cls: type, prefix: str = "") -> Iterator[str]:
    """Yield the dotted name of every setting of the dataclass `cls`, including nested ones and those of all variants."""
    if has_variants(cls):
        variants = cast("Any", cls).variants().values()
        yield from dict.fromkeys(name for variant in variants for name in dotted_names(variant, prefix))
        return
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from dotted_names(hints[field.name], f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def shaping(config: Any, *results: str, mark: str = "shapes", prefix: str = "") -> dict[str, Any]:
    """Return the settings in the dataclass `config` that shape one of `results`, by dotted name, in plain containers.

    `mark="locates"` selects the settings that locate the rows of these results instead. A setting at its default of None or
    False, or at the value `before` it existed, is omitted, so that adding such a setting in a new version changes no key. The
    order of patterns is significant.
    """
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found |= shaping(value, *results, mark=mark, prefix=f"{prefix}{field.name}.")
        elif not set(results).isdisjoint(field.metadata[mark]):
            off = field.default is None or field.default is False
            before = field.metadata["before"]
            if not (off and value is field.default) and (before is None or value != before):
                found[prefix + field.name] = _plain(value)
    return found


def _plain(value: Any) -> Any:
    """Return `value` in JSON types. Patterns become pairs, in order."""
    if isinstance(value, Mapping):
        return [[key, item] for key, item in value.items()]
    return list(value) if isinstance(value, tuple) else value


def defaults(cls: type) -> dict[str, Any]:
    """Return the default of every setting of the dataclass `cls` that has one, in nested plain containers.

    Required settings are omitted. So is a group with variants, because its defaults depend on the variant.
    """
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        if has_variants(hints[field.name]):
            continue
        if dataclasses.is_dataclass(hints[field.name]):
            values[field.name] = defaults(hints[field.name])
        elif field.default is not _MISSING:
            values[field.name] = list(field.default) if isinstance(field.default, tuple) else field.default
    return values


def _checked(path: str, value: Any, hint: Any, metadata: Mapping[str, Any]) -> Any:
    value = _converted(path, value, hint)
    if value is None:
        return None
    check_secret(path, value)
    if isinstance(value, str):
        check_encoding(path, value)
    choices = metadata.get("choices")
    if choices:
        for item in value if isinstance(value, tuple) else (value,):
            if item not in choices:
                allowed = ", ".join(map(str, choices))
                near = difflib.get_close_matches(str(item), [str(c) for c in choices], n=1)
                hint_text = f" (did you mean '{near[0]}'?)" if near else ""
                raise UserError(f"{path}={item}: not a choice{hint_text}; choose from: {allowed}")
    for bound, holds, words in (
        ("ge", lambda limit: value >= limit, "at least"),
        ("gt", lambda limit: value > limit, "greater than"),
        ("lt", lambda limit: value < limit, "less than"),
    ):
        limit = metadata.get(bound)
        if limit is not None and not holds(limit):
            raise UserError(f"{path}={value}: out of range; give a value {words} {limit}")
    if isinstance(value, int) and abs(value) >= 2**64:
        raise UserError(f"{path}={value}: out of range; give a value that fits 64 bits")
    return value


def check_encoding(name: str, value: str) -> None:
    """Raise UserError if a text holds bytes that are no character, as paths beyond ASCII do in the locale C."""
    try:
        value.encode()
    except UnicodeEncodeError:
        shown = value.encode(errors="backslashreplace").decode()
        raise UserError(f"{name}: {shown} has characters that are not readable in this locale; set LC_ALL=C.UTF-8 or PYTHONUTF8=1 in "
                        "the environment, or use a name of ASCII characters") from None  # fmt: skip


def check_secret(name: str, value: Any) -> None:
    """Raise UserError if the text of a setting's `value` holds a secret: every record of a run repeats its settings."""
    if (shown := masked(str(value))) != str(value):
        raise UserError(f"{name}={shown}: holds a token or password, which every record of the run would repeat; "
                        "set it in the environment (HF_TOKEN), and leave it out here")  # fmt: skip


def _converted(path: str, value: Any, hint: Any) -> Any:
    """Return `value` converted to the type `hint`. Raises UserError if the conversion would lose information."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        if value is None:
            return None
        (hint,) = (h for h in typing.get_args(hint) if h is not type(None))
    if typing.get_origin(hint) is tuple:
        if isinstance(value, str) or not isinstance(value, (list, tuple)):
            raise UserError(f"{path}={value}: a list is needed; give {path}=[A,B]")
        return tuple(_converted(path, item, typing.get_args(hint)[0]) for item in value)
    if typing.get_origin(hint) is Mapping:
        if not isinstance(value, Mapping):
            raise UserError(f"{path}={value}: names with their values are needed; give {path}={{NAME:VALUE}}")
        return {str(key): _converted(f"{path}.{key}", item, typing.get_args(hint)[1]) for key, item in value.items()}
    if hint is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    if hint is bool and isinstance(value, bool):
        return value
    if hint in (int, float) and (number := _number(value, hint)) is not None:
        return number
    kind = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a text"}[hint]
    shown = "null" if value is None else value
    raise UserError(f"{path}={shown}: {kind} is needed; give {path}=VALUE")


def _number(value: Any, hint: type) -> float | None:
    """Return `value` as a finite float or, if `hint` is int, as an int of the same value. None if it is neither."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = hint(value)
    except (ValueError, OverflowError):
        return None
    if hint is float:
        return number if math.isfinite(number) else None
    if isinstance(value, float) and number != value:
        return None
    return number
