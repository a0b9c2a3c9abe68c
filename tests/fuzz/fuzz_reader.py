"""The parent's side of the child process: ask, and see what became of it."""

from __future__ import annotations

import json
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from fuzz_mutations import Files

_CHILD = Path(__file__).with_name("fuzz_child.py")
# By the clock, for what waits and does not compute.
_WALL_SECONDS = 300


class Reader:
    """Reads folders in a child process, which is started anew when it died."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process: subprocess.Popen[str] | None = None

    def read(self, parser: str, files: Files) -> dict[str, Any]:
        """Return the verdict on files: its word and the text that goes with it."""
        place = self.folder / "cases" / "case"
        shutil.rmtree(place.parent, ignore_errors=True)
        place.mkdir(parents=True)
        for name, data in files.items():
            (place / name).write_bytes(data)
        process = self._started()
        assert process.stdin and process.stdout
        process.stdin.write(json.dumps({"parser": parser, "folder": str(place)}) + "\n")
        process.stdin.flush()
        answered, _, _ = select.select([process.stdout], [], [], _WALL_SECONDS)
        line = process.stdout.readline() if answered else ""
        if line:
            return dict(json.loads(line))
        process.kill()
        code = process.wait()
        self.process = None
        how = "hung" if not answered else signal.Signals(-code).name if code < 0 else f"exit {code}"
        log = (self.folder / "stderr").read_text(errors="replace")[-3000:]
        return {"verdict": "died", "text": f"{how}\n{log}"}

    def close(self) -> None:
        if self.process is not None:
            self.process.communicate()

    def _started(self) -> subprocess.Popen[str]:
        if self.process is None or self.process.poll() is not None:
            with open(self.folder / "stderr", "w") as stderr:
                self.process = subprocess.Popen(
                    [sys.executable, _CHILD],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=stderr,
                    text=True,
                )
        return self.process
