"""What this machine has, and the variables that keep a replica to its share of it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import psutil

from .state.resources import Capacity, Demand, check_amount


def measure_node(num_cpus: float | None, num_gpus: int | None, resources: Mapping[str, float]) -> Capacity:
    """Returns what this machine has, or what the operator says it has. Raises BadValue for amounts that no machine has."""
    for flag, amount in (("--num-cpus", num_cpus), ("--num-gpus", num_gpus)):
        if amount is not None:
            check_amount(flag, amount)
    gpus = _gpus() if num_gpus is None else tuple(str(position) for position in range(num_gpus))
    return Capacity(num_cpus if num_cpus is not None else os.cpu_count() or 1, gpus, psutil.virtual_memory().total, dict(resources))


def replica_environment(demand: Demand, capacity: Capacity, gpus: tuple[int, ...], env: Mapping[str, str]) -> dict[str, str]:
    """Returns variables that keep a replica to its share; OMP_NUM_THREADS only if the environment does not set it."""
    found: dict[str, str] = {}
    if "OMP_NUM_THREADS" not in env:
        found["OMP_NUM_THREADS"] = str(max(1, int(demand.num_cpus)))
    if demand.num_gpus:
        found["CUDA_VISIBLE_DEVICES"] = ",".join(capacity.gpus[position] for position in gpus)
    return found


def _gpus() -> tuple[str, ...]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return tuple(device for device in visible.split(",") if device.strip() not in ("", "-1"))
    folder = Path("/proc/driver/nvidia/gpus")
    return tuple(str(position) for position in range(len(list(folder.iterdir())))) if folder.is_dir() else ()
