"""Small models to tune, and workers that misbehave on purpose."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

import tvm_sparse as ts
from tvm_sparse import zoo
from tvm_sparse.targets import machine_of, resolve_target, target_data
from tvm_sparse.tuning.job import Job, rotation
from tvm_sparse.workload import MatmulGeometry, Workload

# A worker in which candidates of some heights fail in their own ways.
_WORKER = """
import os, time
from tvm_sparse.tuning import trial, worker

honest = trial.Bench.prepare

def prepare(self, kernel, config):
    if config.get("mr") == {crash}:
        os.abort()
    if config.get("mr") == {hang}:
        time.sleep(600)
    if config.get("mr") == {wrong}:
        weights = self.job.weights
        self._expected()
        object.__setattr__(self.job, "weights", [2 * w for w in weights])
        try:
            return honest(self, kernel, config)
        finally:
            object.__setattr__(self.job, "weights", weights)
    return honest(self, kernel, config)

trial.Bench.prepare = prepare
worker.main()
"""


def misbehaving_worker(folder: Path, crash: int = 0, hang: int = 0, wrong: int = 0) -> list[str]:
    """Write a worker whose candidates crash, hang or compute nonsense at these register tiles."""
    script = folder / "worker.py"
    script.write_text(_WORKER.format(crash=crash, hang=hang, wrong=wrong))
    return [sys.executable, str(script)]


def small_model(features: int = 64, tokens: int = 32, sparsity: float = 0.9) -> Any:
    """Return a pruned layer."""
    layer = zoo.single_matmul(features, features, tokens)
    return ts.load(ts.prune(layer, sparsity=sparsity, scope="layer"))


def small_job(rows: int = 48, columns: int = 64, tokens: int = 32, threads: int = 1) -> Job:
    """Return a job of one pruned matrix."""
    target = resolve_target("native")
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((rows, columns), np.float32)
    weight[np.abs(weight) < 1.6] = 0
    workload = Workload("matmul", MatmulGeometry(rows, columns, tokens), threads=threads)
    machine = machine_of(target, threads)
    return Job(workload, machine, target_data(target), rotation([weight]), [])
