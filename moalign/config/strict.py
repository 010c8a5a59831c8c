"""The base of every typed setting in moalign: unknown keys are errors, values are not coerced loosely."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """A frozen pydantic model that refuses unknown keys.

    A method's ``Config``, a recipe and a task card are all of this kind, so that one validator
    (:mod:`moalign.config.validate`) can report every error at once with file, line and nearest key.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    @classmethod
    def borrows(cls, given: Mapping[str, Any]) -> dict[str, str]:
        """Return section -> method: what ``given`` omits there is taken from the task's recipe of that method."""
        return {}
