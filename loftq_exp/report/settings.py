"""A run's settings by dotted name: which of them make it another run, and which are its seeds."""

from __future__ import annotations

import dataclasses
import functools
import json
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from loftq_exp.config import RunConfig, TaskConfig
from loftq_exp.config.schema import has_variants

SEEDS = ("seed", "calibration.seed")
"""The settings that distinguish repetitions of one experiment."""
SCORED = "scored_adapter"
"""As in metrics.json. It counts as a setting of a run that scored its initial adapter, because `stages` is none."""
SOURCES = ("model.path", "model.name", "model.member", "model.revision", "quant.path", "quant.revision")
"""Settings that shape no result by their name, but by the content that they locate."""
_OTHER = ("hub", "report", "published")
"""Groups whose settings never make another run, also those of another version."""
_TELLING = ("model.name", "model.path", "task.kind", "task.name", "quant.method", "quant.type", "quant.bits", "quant.rank",
            "quant.iter")  # fmt: skip


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the nested settings of a run by dotted name. A setting that is itself a mapping stays one value."""
    values: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and name not in _declared(""):
            values |= {f"{name}.{own}": each for own, each in value.items()}
        else:
            values[name] = value
    return values


def identity(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that make a run another run, with its seeds, by dotted name in the order of their declaration.

    These are the settings that shape a result or locate what it is made of. A setting that the record lacks has the value
    that runs had before it existed. An unknown setting counts, so that runs are rather kept apart than averaged.
    """
    values, fields = flatten(metrics["config"]), declared(metrics)
    found = {
        name: values[name] if name in values else _before(field)
        for name, field in fields.items()
        if shapes(field) or name in SOURCES
    }
    found |= {name: values[name] for name in values if name not in fields and name.partition(".")[0] not in _OTHER}
    if found.get("quant.calibration") in (None, "none"):
        found = {name: value for name, value in found.items() if not name.startswith("calibration.")}
    if metrics.get(SCORED) == "initial":
        found[SCORED] = "initial"
    return found


def shapes(field: dataclasses.Field[Any], *results: str) -> bool:
    """Return whether a setting shapes one of `results` (without any: of all), or locates the rows that it is made of."""
    marks = {*field.metadata["shapes"], *field.metadata["locates"]}
    return bool(marks & set(results) if results else marks)


def declared(metrics: Mapping[str, Any]) -> Mapping[str, dataclasses.Field[Any]]:
    """Return the declarations of all settings of a run by dotted name."""
    return _declared(str(metrics["config"].get("task", {}).get("kind", "")))


def canonical(value: Any) -> str:
    """Return a text that is equal for equal values: 4 and 4.0 are equal, as are a tuple and a list."""
    return json.dumps(_as_floats(value), default=str)


def by_telling(names: Iterable[str]) -> list[str]:
    """Return the names of settings, the most telling first: model, task, method, type, bits, rank, steps, then as given."""
    names = list(dict.fromkeys(names))
    return [name for name in _TELLING if name in names] + [name for name in names if name not in _TELLING]


def shown(value: Any) -> str:
    """Return a setting's value as it is typed: null for None, true, a text without quotes."""
    return str(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else json.dumps(value)


def model_label(settings: Mapping[str, Any]) -> str:
    """Return the model's name: that in its wheel, or the last part of its path."""
    name, path = settings.get("model.name"), str(settings.get("model.path") or "")
    return str(name) if name else path.rstrip("/").rpartition("/")[2]


def task_label(settings: Mapping[str, Any]) -> str:
    """Return the task's kind, with its data set's name if it has several."""
    return "-".join(str(settings[name]) for name in ("task.kind", "task.name") if settings.get(name))


def _as_floats(value: Any) -> Any:
    if isinstance(value, Mapping):
        return [[key, _as_floats(item)] for key, item in value.items()]  # the order of patterns is significant
    if isinstance(value, (list, tuple)):
        return [_as_floats(item) for item in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _before(field: dataclasses.Field[Any]) -> Any:
    if field.metadata["before"] is not None:
        return field.metadata["before"]
    return None if field.default is dataclasses.MISSING else field.default


@functools.cache
def _declared(kind: str) -> Mapping[str, dataclasses.Field[Any]]:
    """Return the declarations of all settings of a run by dotted name, those of the task if its `kind` is known."""
    return dict(_fields(RunConfig, kind))


def _fields(cls: type, kind: str, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if has_variants(hint):
            hint = TaskConfig.variants().get(kind)
            if hint is None:
                continue
        if dataclasses.is_dataclass(hint):
            yield from _fields(typing.cast("type", hint), kind, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, field
