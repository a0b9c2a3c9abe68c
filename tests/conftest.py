"""What all tests share: settings of hypothesis, and no green run in which nothing ran."""

from __future__ import annotations

import os
import tempfile

import pytest
from hypothesis import HealthCheck, settings

# Before anything reads it: no test sees or changes what the user has calibrated.
_HOME = tempfile.TemporaryDirectory(prefix="tvm-sparse-tests-")
os.environ["TVM_SPARSE_HOME"] = _HOME.name

# A shared runner is slow at times, and a failure must be the same when it is run again.
settings.register_profile(
    "ci", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("local", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Fail a run in which no test passed, for example because all were skipped."""
    config = session.config
    if hasattr(config, "workerinput") or config.option.collectonly or exitstatus != 0:
        return
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and not reporter.stats.get("passed"):
        reporter.write_line("\nno test passed: a run that tests nothing counts as a failure")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
