"""The process that reads damaged files: a crash, a hang or too much memory ends it, and no test.

Reads a line of JSON for every folder, and answers one: what became of it.
"""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from fuzz_parsers import PARSERS, is_a_sentence

from tvm_sparse.errors import SparseError

# Seconds of processor time, not of the clock: other work on the machine does not count.
CPU_SECONDS = 20
# What one file may make the process allocate beyond what it has, in bytes.
MEMORY = 1 << 30


def verdict_on(parser: str, folder: Path) -> dict[str, Any]:
    """Read a folder, and say what became of it."""
    try:
        PARSERS[parser].read(folder)
    except SparseError as error:
        text = str(error)
        return {"verdict": "refused" if is_a_sentence(text) else "no sentence", "text": text}
    except BaseException as error:
        frames = traceback.format_exception(error)
        return {"verdict": "raised", "text": "".join(frames)[-6000:]}
    return {"verdict": "read", "text": ""}


def limit_memory() -> None:
    """Let the process have so much more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    used = pages * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))


def main() -> None:
    """Answer until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    faulthandler.enable()
    import tvm  # noqa: F401

    for line in sys.stdin:
        command = json.loads(line)
        limit_memory()
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        answer = verdict_on(command["parser"], Path(command["folder"]))
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
