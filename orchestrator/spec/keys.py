"""The key of a stage: a hash of exactly what can change its result.

A field at its default counts like any other, except fields that came later (trainers.specs.ADDED). Names, paths and
devices are left out, so sweeps that compute the same share one artifact. When a stage's computation changes, its version
is raised.
"""

import dataclasses
import hashlib
import json
import math
from typing import Any, Union

from trainers.errors import SpecError

Stable = Union[str, int, float, bool, None, "list[Stable]", "dict[str, Stable]"]


def stable(value: object) -> Stable:
    """`value` as plain JSON values. Raises SpecError where it has no stable identity."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise SpecError(f"{value} cannot be part of a key.")
        # 0 and 0.0 are equal as specs, so they are equal as keys.
        return int(value) if value.is_integer() else value
    if isinstance(value, tuple | list):
        return [stable(item) for item in value]
    if isinstance(value, dict) and all(isinstance(name, str) for name in value):
        return {name: stable(item) for name, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        usual = {
            field.name: getattr(value, field.name)
            for field in dataclasses.fields(value)
            if not field.metadata.get("added")
        }
        return {name: stable(item) for name, item in (usual | changed(value)).items()}
    raise SpecError(f"a {type(value).__name__} has no stable identity and cannot be part of a key.")


def changed(value: Any) -> dict[str, Any]:
    """Return the fields of a dataclass that came later (trainers.specs.ADDED) and are not at their defaults."""
    return {
        field.name: found
        for field in dataclasses.fields(value)
        if field.metadata.get("added") and (found := getattr(value, field.name)) != field.default
    }


def content_key(stage: str, version: int, **inputs: object) -> str:
    """Hash of exactly the inputs that can change a stage's result: 32 hexadecimal digits."""
    canonical = json.dumps([stage, version, stable(inputs)], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:32]
