"""Typed settings in plain words: what a field allows, and the table of a model's fields."""

from __future__ import annotations

import ast
import inspect
import itertools
import json
import textwrap
import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

_SCALARS: dict[Any, str] = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
    Any: "any value",
}
_BOUNDS = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))


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


class Slot(NamedTuple):
    """A place for a value: its type and pydantic's constraints on it."""

    annotation: Any
    metadata: tuple[Any, ...] = ()
    discriminator: str | None = None

    @classmethod
    def of(cls, field: FieldInfo) -> Slot:
        """Return the slot of a model's field."""
        return cls(field.annotation, tuple(field.metadata), _discriminator(field))

    def bare(self) -> Slot:
        """Return the slot without ``Annotated`` wrappers and without the ``None`` of an optional value."""
        slot = self
        while True:
            origin, args = get_origin(slot.annotation), get_args(slot.annotation)
            if origin is Annotated:
                infos = [item for item in args[1:] if isinstance(item, FieldInfo)]
                inner = [part for info in infos for part in info.metadata]
                plain = [item for item in args[1:] if not isinstance(item, FieldInfo)]
                discriminator = next((name for name in map(_discriminator, infos) if name), slot.discriminator)
                slot = Slot(args[0], (*slot.metadata, *plain, *inner), discriminator)
            elif is_union(slot.annotation) and type(None) in args and len(args) == 2:
                slot = slot._replace(annotation=next(arg for arg in args if arg is not type(None)))
            else:
                return slot

    def branches(self) -> tuple[Any, ...]:
        """Return the types of a union except None; empty for any other slot."""
        slot = self.bare()
        return tuple(a for a in get_args(slot.annotation) if a is not type(None)) if is_union(slot.annotation) else ()

    def tags(self) -> dict[str, type[BaseModel]]:
        """Return tag -> model for a union whose branches a key (``discriminator``) distinguishes."""
        name = self.bare().discriminator
        models = {}
        for branch in self.branches() if name else ():
            for tag in get_args(branch.model_fields[name].annotation):
                models[str(tag)] = branch
        return models

    def literals(self) -> list[str]:
        """Return the texts that a slot of fixed choices allows."""
        places = self.branches() or (self.bare().annotation,)
        return [arg for place in places if get_origin(place) is Literal for arg in get_args(place) if type(arg) is str]


def _discriminator(field: FieldInfo) -> str | None:
    return field.discriminator if isinstance(field.discriminator, str) else None


def is_union(annotation: Any) -> bool:
    """Return whether the type is ``A | B`` or ``Union[A, B]``."""
    return get_origin(annotation) in (Union, types.UnionType)


def is_model(annotation: Any) -> bool:
    """Return whether the type is a pydantic model."""
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def words(slot: Slot) -> str:
    """Return in words what a slot allows, bounds included.

    >>> words(Slot(int | None))
    'a whole number or null'
    """
    optional = is_union(slot.annotation) and type(None) in get_args(slot.annotation)
    slot = slot.bare()
    if is_union(slot.annotation):
        if tags := slot.tags():
            parts = [f"a section with {slot.discriminator} {_either([repr(tag) for tag in sorted(tags)])}"]
        else:
            parts = [words(Slot(branch, slot.metadata)) for branch in slot.branches()]
    elif get_origin(slot.annotation) is Literal:
        parts = [yaml_form(choice) for choice in get_args(slot.annotation)]
    else:
        parts = [_plain(slot)]
    return _either([*parts, "null"] if optional or type(None) in get_args(slot.annotation) else parts)


def _plain(slot: Slot) -> str:
    origin, args = get_origin(slot.annotation), get_args(slot.annotation)
    if is_model(slot.annotation):
        return f"a section (keys {', '.join(slot.annotation.model_fields)})"
    kind = origin or slot.annotation
    if isinstance(kind, type) and issubclass(kind, Mapping):
        inner = f" of {words(Slot(args[1]))}" if args and args[1] is not Any else ""
        return f"a section{inner}{_length(slot)}"
    if isinstance(kind, type) and issubclass(kind, tuple) and args and args[-1] is not Ellipsis:
        return f"a list of {len(args)}: {', '.join(words(Slot(arg)) for arg in args)}"
    if isinstance(kind, type) and issubclass(kind, Sequence | set | frozenset) and kind is not str:
        inner = f" of {words(Slot(args[0]))}" if args and args[0] is not Any else ""
        return f"a list{inner}{_length(slot)}"
    text = _SCALARS.get(kind, getattr(kind, "__name__", str(kind)))
    return text + _bounds(slot) + (_length(slot) if kind is str else "")


def _bounds(slot: Slot) -> str:
    bounds = [
        f"{sign} {getattr(item, name)}"
        for name, sign in _BOUNDS
        for item in slot.metadata
        if getattr(item, name, None) is not None
    ]
    steps = [f"a multiple of {item.multiple_of}" for item in slot.metadata if getattr(item, "multiple_of", None)]
    patterns = [f"that matches {item.pattern}" for item in slot.metadata if getattr(item, "pattern", None)]
    return "".join(f" {part}" for part in (" and ".join(bounds + steps), *patterns) if part)


def _length(slot: Slot) -> str:
    least = next((item.min_length for item in slot.metadata if getattr(item, "min_length", None)), None)
    most = next((item.max_length for item in slot.metadata if getattr(item, "max_length", None) is not None), None)
    if least is None and most is None:
        return ""
    if least == most:
        return f" (exactly {least})"
    return f" ({' and '.join([f'at least {least}'] * bool(least) + [f'at most {most}'] * (most is not None))})"


def _either(parts: list[str]) -> str:
    parts = list(dict.fromkeys(parts))
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} or {parts[-1]}"


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

    Types are in words, defaults as in YAML, and ``doc`` is the text under the field in the source file. With
    ``preset`` (a section's own default) its values are the defaults.
    """
    rows: list[FieldRow] = []
    docs = _docs(model)
    for name, field in model.model_fields.items():
        slot = Slot.of(field)
        value = getattr(preset, name) if preset else field.get_default(call_default_factory=True, validated_data={})
        if is_model(slot.annotation):
            rows.extend(fields(slot.annotation, f"{prefix}{name}.", value if isinstance(value, BaseModel) else None))
            continue
        if field.is_required() and preset is None:
            default = "required"
        else:
            default = "" if value is PydanticUndefined else yaml_form(value)
        rows.append(FieldRow(prefix + name, words(slot), default, field.description or docs.get(name, "")))
    return rows


def _docs(model: type[BaseModel]) -> dict[str, str]:
    """Return field -> the text that stands under it in the class body, parents included."""
    docs: dict[str, str] = {}
    for cls in reversed(model.__mro__):
        if not (is_model(cls) and cls is not BaseModel):
            continue
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
        except (OSError, TypeError, SyntaxError):
            continue  # no source file (a zipped install, a class made at run time): fields have no text
        statements = body.body if isinstance(body, ast.ClassDef) else []
        for field, text in itertools.pairwise(statements):
            if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
                continue
            if (
                isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
                and isinstance(text.value.value, str)
            ):
                docs[field.target.id] = " ".join(text.value.value.split())
    return docs
