"""The resources that a replica asks for and a node has: CPUs, GPUs (also fractions), memory, and any that the operator names."""

from __future__ import annotations

from typing import Any

import msgspec

from ...broker.errors import BadType, BadValue

_REFUSED = ("lifetime", "name", "max_restarts", "placement_group")
_EPSILON = 1e-9


class Demand(msgspec.Struct, frozen=True, omit_defaults=True):
    """The resources that one replica reserves. The default is none; in Ray each replica takes a CPU."""

    num_cpus: float = 0
    num_gpus: float = 0
    memory: int = 0  # bytes
    resources: dict[str, float] = {}

    def __str__(self) -> str:
        named = {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus, "memory": self.memory, **self.resources}
        return ", ".join(f"{name} {amount:g}" for name, amount in named.items() if amount) or "nothing"


class Capacity(msgspec.Struct, frozen=True, omit_defaults=True):
    """The resources of one node; `gpus` are device ids as in CUDA_VISIBLE_DEVICES."""

    num_cpus: float = 0
    gpus: tuple[str, ...] = ()
    memory: int = 0
    resources: dict[str, float] = {}


class ActorOptions(msgspec.Struct, frozen=True, omit_defaults=True):
    """How each replica of a backend runs: its resources, and its Python (a path, or packages laid over the node's own), with the seal of
    the client that chose it."""

    demand: Demand = Demand()
    python: str = ""
    pip: tuple[str, ...] = ()
    seal: bytes = b""


class Room:
    """The free resources of one node; only `take` changes them."""

    def __init__(self, capacity: Capacity) -> None:
        self._cpus = capacity.num_cpus
        self._memory: float = capacity.memory
        self._named = dict(capacity.resources)
        self._gpus = [1.0] * len(capacity.gpus)

    def __repr__(self) -> str:
        return f"<Room for {self._cpus:g} CPUs, {sum(self._gpus):g} GPUs>"

    def fit(self, demand: Demand) -> tuple[int, ...] | None:
        """Returns the GPUs (by index) that the replica would get, or None if it does not fit."""
        if demand.num_cpus > self._cpus + _EPSILON or demand.memory > self._memory:
            return None
        if any(amount > self._named.get(name, 0) + _EPSILON for name, amount in demand.resources.items()):
            return None
        if demand.num_gpus == 0:
            return ()
        if demand.num_gpus < 1:  # take the fullest device that still has room, so that whole devices stay whole
            fitting = [position for position, free in enumerate(self._gpus) if free + _EPSILON >= demand.num_gpus]
            return (min(fitting, key=lambda position: self._gpus[position]),) if fitting else None
        whole = [position for position, free in enumerate(self._gpus) if free > 1 - _EPSILON]
        wanted = int(demand.num_gpus)
        return tuple(whole[:wanted]) if len(whole) >= wanted else None

    def take(self, demand: Demand, gpus: tuple[int, ...]) -> None:
        self._cpus -= demand.num_cpus
        self._memory -= demand.memory
        for name, amount in demand.resources.items():
            self._named[name] = self._named.get(name, 0) - amount
        for position in gpus:
            if position < len(self._gpus):
                self._gpus[position] -= min(1.0, demand.num_gpus)


def parse_actor_options(options: object) -> ActorOptions:
    """Parses actor options with the errors of Ray Serve 1.x: BadType for a wrong type, BadValue for a negative or unknown one."""
    if options is None:
        return ActorOptions()
    if not isinstance(options, dict):
        raise BadType(f"actor_options must be a dict such as {{'num_gpus': 0.5}}, not {type(options).__name__}")
    for key in options:
        if key in _REFUSED:
            raise BadValue(f"actor_options may not set {key!r}: replicas are named and restarted by the controller")
        if key not in (*Demand.__struct_fields__, "python", "pip"):
            raise BadValue(f"actor_options has no {key!r}: there are num_cpus, num_gpus, memory, resources, python and pip")
    num_gpus = check_amount("num_gpus", options.get("num_gpus", 0))
    if num_gpus > 1 and num_gpus != int(num_gpus):
        raise BadValue(f"num_gpus is {num_gpus:g}: above 1 it must be whole, since a replica gets whole devices or a part of one")
    named = options.get("resources", {})
    if not isinstance(named, dict):
        raise BadType(f"resources must be a dict such as {{'tpu': 1}}, not {type(named).__name__}")
    demand = Demand(
        num_cpus=check_amount("num_cpus", options.get("num_cpus", 0)),
        num_gpus=num_gpus,
        memory=int(check_amount("memory", options.get("memory", 0))),
        resources={str(name): check_amount(f"resources[{name!r}]", amount) for name, amount in named.items()},
    )
    return ActorOptions(demand, _python(options.get("python", "")), _pip(options.get("pip", ())))


def parse_node_resources(text: str) -> dict[str, float]:
    """Parses the value of `--resources`. Raises BadValue unless it is a JSON object of numbers."""
    try:
        named = msgspec.json.decode(text, type=dict[str, float])
    except msgspec.MsgspecError as error:
        raise BadValue(f"--resources must be a JSON object of numbers such as '{{\"tpu\": 1}}', not {text!r} ({error})") from error
    return {name: check_amount(f"--resources {name!r}", amount) for name, amount in named.items()}


def check_amount(name: str, value: Any) -> float:
    """Raises BadType unless the value is a number, BadValue if it is negative or not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadType(f"{name} must be a number, not {value!r}")
    if value < 0:
        raise BadValue(f"{name} is {value}, and cannot be negative")
    if not value <= 2**53:
        raise BadValue(f"{name} is {value}: no machine has that")
    return value


def _python(value: Any) -> str:
    if not isinstance(value, str):
        raise BadType(f"python must be the path of an interpreter, not {value!r}")
    return _without_nul("python", value)


def _pip(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(requirement, str) for requirement in value):
        raise BadType(f"pip must be a list of requirements such as ['scikit-learn==1.5.*'], not {value!r}")
    return tuple(_without_nul("a requirement of pip", requirement) for requirement in value)


def _without_nul(what: str, text: str) -> str:
    """Refuses NUL characters, which no process argument can hold."""
    if "\0" in text:
        raise BadValue(f"{what} is {text!r}, and cannot hold a NUL: leave it out")
    return text
