"""What a server is told when it starts."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..errors import InputError
from ..package_manifest import Verify

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\Z")


@dataclass(frozen=True)
class Settings:
    """How a model is served.

    Attributes
    ----------
    model : str
        A library that `export` wrote, or the folder of a package, which runs on its own runtime.
    name : str
        What clients call the model; by default the name of the file or folder.
    version : str
        The only version that there is.
    host, port : str and int
        Where to listen. Only this machine can reach 127.0.0.1.
    workers : int
        Processes that share the port; each loads the library.
    threads : int, optional
        Threads of one call; see `Runner`.
    instances : int, optional
        Calls at the same time in each worker; by default the cores divided by workers and threads.
    max_batch : int
        Rows that requests are put together to at most; 1 leaves every request alone.
    max_delay_ms : float
        How long a request waits for others to be put together with.
    max_queue : int
        Requests that a worker holds at the same time, from their first byte to their answer.
    max_request_bytes : int
        The longest body that is read.
    max_sizes : mapping of str to int
        The largest values of symbolic sizes that are let in.
    timeout : float
        Seconds that a body may take to arrive, and then a request to be answered.
    grace : float
        Seconds that requests get to end when the server is told to.
    verify : bool or str
        See `load_module`.
    """

    model: str
    name: str = ""
    version: str = "1"
    host: str = "127.0.0.1"
    port: int = 8000
    workers: int = 1
    threads: int | None = None
    instances: int | None = None
    max_batch: int = 1
    max_delay_ms: float = 2.0
    max_queue: int = 128
    max_request_bytes: int = 16 << 20
    max_sizes: Mapping[str, int] = field(default_factory=dict)
    timeout: float = 60.0
    grace: float = 25.0
    verify: Verify = False

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", Path(self.model).absolute().stem)
        if not _NAME.match(self.name):
            raise InputError(
                f"a model's name has letters, digits, '.', '_' and '-', and '{self.name}' has not: "
                "choose one with --name"
            )
        for key in ("workers", "max_batch", "max_queue", "max_request_bytes"):
            if getattr(self, key) < 1:
                raise InputError(f"{key} is 1 or more, not {getattr(self, key)}")

    def to_json(self) -> str:
        """Write the settings, for the workers."""
        return json.dumps({**asdict(self), "verify": _plain(self.verify)})

    @classmethod
    def from_json(cls, text: str) -> Settings:
        """Read what `to_json` wrote."""
        return cls(**json.loads(text))


def _plain(verify: Verify) -> bool | str:
    return verify if isinstance(verify, bool) else str(verify)
