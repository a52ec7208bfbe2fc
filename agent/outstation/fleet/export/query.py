"""SQL over an export: DuckDB in memory, with one view a kind, that reads the exported files and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outstation.fleet.export import manifest as manifests
from outstation.fleet.export.tables import KINDS, arrow_schema
from outstation.foundation.errors import UsageError
from outstation.foundation.extras import install_command

if TYPE_CHECKING:
    import duckdb

_FETCH_ROWS = 1000
_OFFLINE: dict[str, str | bool | int | float | list[str]] = {
    "autoinstall_known_extensions": False,
    "autoload_known_extensions": False,
    "allow_community_extensions": False,
    "python_enable_replacements": False,
}


class ExportQueries:
    """An export opened for SQL. Raises UsageError without an export, and for statements other than queries."""

    def __init__(self, folder: Path) -> None:
        try:
            import duckdb
        except ImportError:
            raise UsageError(f"SQL over an export needs duckdb: {install_command('sql')}") from None
        manifest = manifests.load(folder)
        if manifest is None:
            raise UsageError(f"{folder}: no export here; `outstation fleet db export --out DIR` makes one")
        files: dict[str, list[str]] = {name: [] for name in manifest.filters.kinds}
        for chunk in manifest.read_chunks(folder):
            for file in chunk.files:
                if problem := file.find_path_problem(folder, chunk.number):
                    raise UsageError(f"{folder}: {file.path!r} {problem}; see `outstation fleet audit --export`")
                files.setdefault(file.kind, []).append(str(folder.resolve() / file.path))
        self._duckdb = duckdb
        self._db: duckdb.DuckDBPyConnection = duckdb.connect(":memory:", config=_OFFLINE)
        self._db.execute("SET TimeZone = 'UTC'")
        # Text of files must reach neither the network nor other files, whatever query a person pastes.
        self._db.execute("SET allowed_paths = $1", [[path for paths in files.values() for path in paths]])
        self._db.execute("SET enable_external_access = false")
        for name, paths in files.items():
            self._create_view(name, paths)
        self._db.execute("SET lock_configuration = true")

    def query(self, sql: str) -> tuple[list[str], Iterator[Sequence[Any]]]:
        """Return the names of the columns and the rows of one query. Raises UsageError."""
        kinds = self._duckdb.StatementType
        try:
            statements = self._duckdb.extract_statements(sql)
            if len(statements) != 1 or statements[0].type not in (kinds.SELECT, kinds.EXPLAIN):
                raise UsageError("one query at a time: SELECT, WITH, FROM, DESCRIBE, SUMMARIZE, SHOW or EXPLAIN")
            cursor = self._db.execute(statements[0])
        except self._duckdb.Error as error:
            raise UsageError(f"the query failed: {error}") from None
        return [column[0] for column in cursor.description or ()], self._fetch(cursor)

    def close(self) -> None:
        self._db.close()

    def _fetch(self, cursor: duckdb.DuckDBPyConnection) -> Iterator[Sequence[Any]]:
        try:
            while rows := cursor.fetchmany(_FETCH_ROWS):
                yield from rows
        except self._duckdb.Error as error:
            raise UsageError(f"the query failed: {error}") from None

    def _create_view(self, name: str, paths: list[str]) -> None:
        if name not in KINDS:
            raise UsageError(f"the export has kind {name!r}, which this version does not know; update outstation")
        if not paths:
            import pyarrow

            days = pyarrow.field("day", pyarrow.date32())
            self._db.register(name, pyarrow.schema([*arrow_schema(name), days]).empty_table())
            return
        listed = ", ".join("'" + path.replace("'", "''") + "'" for path in paths)
        source = f"read_parquet([{listed}], hive_partitioning = true, hive_types = {{'day': DATE}})"
        try:
            self._db.execute(f'CREATE VIEW "{name}" AS SELECT * EXCLUDE (kind) FROM {source}')
        except self._duckdb.Error as error:
            raise UsageError(f"the export cannot be read: {error}; see `outstation fleet audit --export`") from None
