"""Hold a JSON value to a JSON schema of the few keywords that the vectors' own has."""

from collections.abc import Mapping
from typing import Any

TYPES: Mapping[str, Any] = {
    **{"object": dict, "array": list, "string": str, "boolean": bool, "integer": int},
    **{"number": (int, float), "null": type(None)},
}


def violations(value: Any, schema: Mapping[str, Any], at: str = "index") -> list[str]:
    """Return where a value breaks a schema, a line for each place.

    Of the keywords ``type``, ``enum``, ``required``, ``properties``, ``additionalProperties``,
    ``items``, ``minItems`` and ``maxItems``; others are not looked at.
    """
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    is_bool = isinstance(value, bool)  # which Python counts among the integers
    fits = [isinstance(value, TYPES[kind]) and is_bool == (kind == "boolean") for kind in kinds]
    if kinds and not any(fits):
        return [f"{at}: {value!r} is no {' or '.join(kinds)}"]
    if "enum" in schema and value not in schema["enum"]:
        return [f"{at}: {value!r} is none of {schema['enum']}"]
    if isinstance(value, dict):
        return _in_object(value, schema, at)
    return _in_array(value, schema, at) if isinstance(value, list) else []


def _in_object(value: dict[str, Any], schema: Mapping[str, Any], at: str) -> list[str]:
    known, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    found = [f"{at}: lacks {key}" for key in schema.get("required", []) if key not in value]
    found += [f"{at}: has {key}" for key in value if others is False and key not in known]
    for key, one in value.items():
        below = known.get(key, others if isinstance(others, dict) else {})
        found += violations(one, below, f"{at}.{key}")
    return found


def _in_array(value: list[Any], schema: Mapping[str, Any], at: str) -> list[str]:
    if len(value) < schema.get("minItems", 0):
        return [f"{at}: has {len(value)} items, not {schema['minItems']} or more"]
    if len(value) > schema.get("maxItems", len(value)):
        return [f"{at}: has {len(value)} items, not {schema['maxItems']} at most"]
    items = schema.get("items", {})
    return [line for i, one in enumerate(value) for line in violations(one, items, f"{at}[{i}]")]
