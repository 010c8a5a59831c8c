"""The base of every typed setting in moalign: unknown keys are errors, values are not coerced loosely."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

RECORDED = {"recorded": True}
"""Context of validation of what stands in the record of a run that older rules allowed."""

LARGEST_INTEGER, LARGEST_NUMBER = 2**63 - 1, 3.4028234663852886e38
"""What 64 bits and single precision hold: tensors take no other numbers."""


class Strict(BaseModel):
    """A frozen pydantic model that refuses unknown keys.

    A method's ``Config``, a recipe and a task card are all of this kind, so that one validator
    (:mod:`moalign.config.validate`) can report every error at once with file, line and nearest key.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    @field_validator("*")
    @classmethod
    def _held_by_tensors(cls, value: Any) -> Any:
        if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
            raise ValueError(f"found {value}; allowed: whole numbers up to {LARGEST_INTEGER}")
        if isinstance(value, float) and abs(value) > LARGEST_NUMBER:
            raise ValueError(f"found {value:g}; allowed: numbers up to {LARGEST_NUMBER:g}")
        return value

    @classmethod
    def borrows(cls, given: Mapping[str, Any]) -> dict[str, str]:
        """Return section -> method: what ``given`` omits there is taken from the task's recipe of that method."""
        return {}


def faults(error: ValidationError) -> list[str]:
    """Return what is wrong with each value in pydantic's words, after its dotted place; of the whole without one."""
    return [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}".removeprefix(": ") for fault in error.errors()]
