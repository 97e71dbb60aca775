"""Type and range of every argument of every public verb, checked before a verb does anything."""

from __future__ import annotations

from ._checked import check_fields, checked

__all__ = ["check_fields", "checked"]
