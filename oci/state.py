"""The state database: typed records in SQLite tables, one JSON text per id.

What survives a restart of the daemon is here and nowhere else. Writes run on one thread, in the order in which they
were asked for; reads happen once, at the start.
"""

import asyncio
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import msgspec

from oci import trace

T = TypeVar("T")
R = TypeVar("R")

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A record that could not be understood: what stands there and why not. It blocks nobody else."""

    id: str
    text: str
    reason: str


class Database:
    """One SQLite file in WAL mode. A transaction survives a crash of the daemon; a power loss may cost the last ones.

    A power loss also ends every process that a lost record spoke of, so nothing stays that nobody knows.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._writer = ThreadPoolExecutor(1, "state")
        self._connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._connection.execute("PRAGMA journal_mode=WAL")
        self._connection.execute("PRAGMA synchronous=NORMAL")
        found = self._connection.execute("PRAGMA user_version").fetchone()[0]
        if found > SCHEMA_VERSION:
            raise RuntimeError(f"{path} was written by a newer Crito (schema {found}, this one knows {SCHEMA_VERSION})")
        self._connection.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
        self._connection.execute("CREATE TABLE IF NOT EXISTS facts (id TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID")

    def fact(self, name: str) -> str | None:
        """One of the few single values, such as the boot id that the records belong to."""
        row = self._connection.execute("SELECT value FROM facts WHERE id = ?", (name,)).fetchone()
        return None if row is None else str(row[0])

    async def set_fact(self, name: str, value: str) -> None:
        await self.run(
            lambda connection: connection.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, value))
        )

    async def run(self, action: Callable[[sqlite3.Connection], R]) -> R:
        """Run `action` on the writer's thread, after everything that was asked for before."""
        return await asyncio.get_running_loop().run_in_executor(self._writer, action, self._connection)

    def close(self) -> None:
        self._writer.shutdown(wait=True)
        self._connection.close()


class Records(Generic[T]):
    """One table of the database: id → record of type T (a frozen dataclass that msgspec can write)."""

    def __init__(self, database: Database, table: str, record_type: type[T]) -> None:
        self._database = database
        self._table = table
        self._encoder = msgspec.json.Encoder()
        self._decoder = msgspec.json.Decoder(record_type)
        database._connection.execute(
            f"CREATE TABLE IF NOT EXISTS {table} (id TEXT PRIMARY KEY, record TEXT) WITHOUT ROWID"
        )

    async def put(self, id: str, record: T) -> None:
        text = self._encoder.encode(record).decode()
        statement = f"INSERT OR REPLACE INTO {self._table} VALUES (?, ?)"
        with trace.step("write record", {"crito.table": self._table}):
            await self._database.run(lambda connection: connection.execute(statement, (id, text)))

    async def delete(self, id: str) -> None:
        statement = f"DELETE FROM {self._table} WHERE id = ?"
        with trace.step("delete record", {"crito.table": self._table}):
            await self._database.run(lambda connection: connection.execute(statement, (id,)))

    def load(self) -> Iterator[tuple[str, T | Unreadable]]:
        """Every record; to be called before the first write."""
        for id, text in self._database._connection.execute(f"SELECT id, record FROM {self._table}").fetchall():
            try:
                yield id, self._decoder.decode(text)
            except (msgspec.DecodeError, ValueError) as error:
                yield id, Unreadable(id, text, str(error))
