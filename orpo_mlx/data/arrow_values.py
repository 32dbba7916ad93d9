"""Rows of Arrow's tables as they were before Arrow gave every object the keys of all objects in its column."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

# Where a null may be data: elsewhere in a row, nulls say nothing in any kind of file.
_HOLD_DATA = ("tools", "functions", "tool_calls", "function_call", "chat_template_kwargs")


class ArrowRow(NamedTuple):
    """A row of a table."""

    value: dict[str, Any]
    nulls_left_out: bool
    """Whether nulls inside tools or tool calls were taken for keys that only other rows have."""


def rows_of(table: Any) -> Iterator[ArrowRow]:
    """The rows of a `pyarrow.Table` or `RecordBatch`, without the nulls that stand for keys which are not there."""
    fields = {field.name: field.type for field in table.schema if _is_nested(field.type)}
    for row in table.to_pylist():
        restore = _Restore()
        for name, kind in fields.items():
            row[name] = restore(row[name], kind, name in _HOLD_DATA)
        yield ArrowRow(row, restore.left_out)


class _Restore:
    """Makes values of columns what they were when they were written, as far as Arrow knows."""

    left_out = False

    def __call__(self, value: Any, kind: Any, holds_data: bool) -> Any:
        import pyarrow

        types = pyarrow.types
        if value is None:
            return None
        if types.is_struct(kind):
            return self._object(value, kind, holds_data)
        if types.is_map(kind):
            # pyarrow gives a map as a list of pairs.
            return {key: self(item, kind.item_type, holds_data) for key, item in dict(value).items()}
        if _is_list(kind):
            return [self(item, kind.value_type, holds_data) for item in value]
        # What `datasets` stores of objects that have no common schema: nothing was filled in there.
        return json.loads(value) if _is_json(kind) and isinstance(value, str) else value

    def _object(self, value: dict[str, Any], kind: Any, holds_data: bool) -> dict[str, Any]:
        import pyarrow

        whole = {}
        for field in kind:
            item = value[field.name]
            # A key that is null in all rows was written as null by one of them: nothing else gives a key.
            if item is not None or pyarrow.types.is_null(field.type):
                whole[field.name] = self(item, field.type, holds_data or field.name in _HOLD_DATA)
            elif holds_data:
                self.left_out = True
        return whole


def _is_nested(kind: Any) -> bool:
    import pyarrow

    return bool(pyarrow.types.is_nested(kind)) or _is_json(kind)


def _is_list(kind: Any) -> bool:
    import pyarrow

    types = pyarrow.types
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _is_json(kind: Any) -> bool:
    # By its name, since pyarrow has a class for it only from 19 on; before, the type is that of plain text.
    return getattr(kind, "extension_name", None) == "arrow.json"
