"""Typed settings in plain words, from the JSON schema that pydantic makes of a model."""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import json
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

Schema = dict[str, Any]
"""The JSON schema of a place for a value, references written out."""

_SCALARS = {
    "string": "text",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "null": "null",
    None: "any value",
}
_BOUNDS = {
    "exclusiveMinimum": ">",
    "minimum": ">=",
    "exclusiveMaximum": "<",
    "maximum": "<=",
    "multipleOf": "a multiple of",
}


class FieldRow(NamedTuple):
    """One setting as ``show`` and the documentation list it."""

    name: str
    """Key path below the model, such as ``lora.r``."""
    type: str
    """What is allowed, in words."""
    default: str
    """The default as it would stand in YAML; ``required`` when there is none."""
    doc: str
    """The text under the field in the source, on one line; empty without one."""


@functools.cache
def schema_of(model: type[BaseModel]) -> Schema:
    """Return the schema of a model's section."""
    schema = model.model_json_schema()
    whole: Schema = written_out(schema, schema.get("$defs", {}))
    return whole


def written_out(node: Any, definitions: Schema) -> Any:
    """Return a schema with every reference (``#/$defs/Name``) replaced by what it refers to."""
    if isinstance(node, str) and node.startswith("#/$defs/"):
        return written_out(definitions[node.removeprefix("#/$defs/")], definitions)
    if isinstance(node, list):
        return [written_out(item, definitions) for item in node]
    if isinstance(node, dict):
        inner = {key: written_out(item, definitions) for key, item in node.items() if key != "$defs"}
        if patterns := inner.pop("patternProperties", None):  # keys of one pattern
            inner["propertyNames"] = {"type": "string", "pattern": next(iter(patterns))}
            inner["additionalProperties"] = next(iter(patterns.values()))
        return {**inner.pop("$ref", {}), **inner}
    return node


def bare(schema: Schema) -> Schema:
    """Return what an optional value is when it is not null."""
    options = [option for option in schema.get("anyOf", []) if option.get("type") != "null"]
    return bare(options[0]) if len(options) == 1 else schema


def tags(schema: Schema) -> dict[str, Schema]:
    """Return tag -> section where a key (``discriminator``) says which section is meant."""
    sections: dict[str, Schema] = schema.get("discriminator", {}).get("mapping", {})
    return sections


def words(schema: Schema) -> str:
    """Return in words what a place for a value allows, bounds included.

    >>> words({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "null"}]})
    'a whole number >= 1 or null'
    """
    return either(_parts(schema))


def _parts(schema: Schema) -> list[str]:
    if sections := tags(schema):
        return [f"a section with {schema['discriminator']['propertyName']} {either([*map(repr, sorted(sections))])}"]
    if "anyOf" in schema:
        return [part for option in schema["anyOf"] for part in _parts(option)]
    if choices := schema.get("enum", [schema["const"]] if "const" in schema else []):
        return [yaml_form(choice) for choice in choices]
    if "properties" in schema:
        return [f"a section (keys {', '.join(schema['properties'])})"]
    if "prefixItems" in schema:
        return [f"a list of {len(schema['prefixItems'])}: {', '.join(map(words, schema['prefixItems']))}"]
    kind = schema.get("type")
    if kind in {"object", "array"}:
        inner = schema.get("additionalProperties" if kind == "object" else "items")
        name = "a section" if kind == "object" else "a list"
        return [name + (f" of {words(inner)}" if isinstance(inner, dict) and inner else "") + _length(schema)]
    bounds = " and ".join(f"{sign} {schema[name]}" for name, sign in _BOUNDS.items() if name in schema)
    pattern = f"that matches {schema['pattern']}" if "pattern" in schema else ""
    return [" ".join(filter(None, (_SCALARS.get(kind, str(kind)), bounds, pattern))) + _length(schema)]


def _length(schema: Schema) -> str:
    least, most = schema.get("minLength", schema.get("minItems")), schema.get("maxLength", schema.get("maxItems"))
    if least == most:
        return "" if least is None else f" (exactly {least})"
    limits = [f"at {name} {limit}" for name, limit in (("least", least), ("most", most)) if limit is not None]
    return f" ({' and '.join(limits)})"


def either(parts: list[str]) -> str:
    """Return what may be chosen: ``a``, ``a or b``, ``a, b or c``; what stands twice once."""
    parts = list(dict.fromkeys(parts))
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} or {parts[-1]}"


def key_paths(model: type[BaseModel]) -> list[str]:
    """Return every key path of a model's section, sections and what is in them: ``lora``, ``lora.r``; not in lists."""
    return list(_key_paths(schema_of(model), ""))


def _key_paths(schema: Schema, prefix: str) -> Iterator[str]:
    for name, place in bare(schema).get("properties", {}).items():
        yield prefix + name
        yield from _key_paths(place, f"{prefix}{name}.")


def yaml_form(value: Any) -> str:
    """Return a value as it would stand in YAML, on one line.

    >>> yaml_form({"a": [None, True, "b"]})
    "{a: [null, true, 'b']}"
    """
    if isinstance(value, BaseModel):
        return yaml_form(value.model_dump())
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {yaml_form(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple | set | frozenset):
        return "[" + ", ".join(yaml_form(item) for item in value) + "]"
    return json.dumps(value) if value is None or isinstance(value, bool) else repr(value)


def fields(model: type[BaseModel], prefix: str = "", preset: BaseModel | None = None) -> list[FieldRow]:
    """Return one row per setting of ``model``; sections that are models themselves are listed key by key.

    With ``preset`` (a section's own default) its values are the defaults.
    """
    rows: list[FieldRow] = []
    docs, places = _docs(model), schema_of(model)["properties"]
    for name, field in model.model_fields.items():
        value = getattr(preset, name) if preset else field.get_default(call_default_factory=True, validated_data={})
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            rows += fields(field.annotation, f"{prefix}{name}.", value if isinstance(value, BaseModel) else None)
            continue
        default = "required" if value is PydanticUndefined else yaml_form(value)
        rows.append(FieldRow(prefix + name, words(places[name]), default, field.description or docs.get(name, "")))
    return rows


def _docs(model: type[BaseModel]) -> dict[str, str]:
    """Return field -> the text that stands under it in the class body, parents included."""
    docs: dict[str, str] = {}
    for cls in reversed(model.__mro__):
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
        except (OSError, TypeError, SyntaxError):
            continue  # no source file (a zipped install, a class made at run time): fields have no text
        for field, text in itertools.pairwise(getattr(body, "body", [])):
            match field, text:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(doc))):
                    docs[name] = " ".join(doc.split())
    return docs
