"""The JSON file of figures: rewritten after every record, so that a run that is killed loses none and the next one resumes."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.harness.environment import commit, environment

Record = dict[str, Any]


class Store:
    """Records of one machine by key. Each says the level, the case and the threads, the commit and the date."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.environment: Record = {}
        self.records: dict[str, Record] = {}
        self._commit, self.fresh = "", False
        self._made: set[str] = set()  # in this run
        if path.exists():
            content = json.loads(path.read_text(encoding="utf-8"))
            self.environment, self.records = content["environment"], content["records"]

    def begin(self, fresh: bool = False, device: str = "cpu") -> "Store":
        """Before measuring: forgets all records if they are of another machine or of other versions. `fresh`: uses none."""
        now, self._commit, self.fresh = environment(device), commit(), fresh
        if now != self.environment:
            self.environment, self.records = now, {}
        return self

    def keep(self, key: str, make: Callable[[], Record]) -> Record:
        """The record of this key: that of this run, or the file's if nothing has changed since its commit, else made now.

        A record with a `code` other than 0 is of a command that failed, and is made again.
        """
        held = self.records.get(key, {})
        stale = self.fresh or held.get("commit") != self._commit or self._commit.endswith("+") or held.get("code")
        if stale and key not in self._made:
            self.write(key, make())
        return self.records[key]

    def write(self, key: str, record: Record) -> None:
        """Adds a record, on the disk too."""
        self._made.add(key)
        self.records[key] = {**record, "commit": self._commit, "date": time.strftime("%Y-%m-%d")}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        content = {"environment": self.environment, "records": self.records}
        part.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        part.replace(self.path)
