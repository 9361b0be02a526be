"""`mqserve setup --print`: RabbitMQ and Redis users for an instance. Each role gets the rights that it uses and no others."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shlex
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..broker.errors import BadValue
from ..broker.queue_names import (
    dead_exchange,
    dead_queue,
    due_queue,
    endpoints_exchange,
    jobs_exchange,
    later_exchange,
    requests_exchange,
    webhooks_queue,
)
from ..broker.settings import read_secret
from ..broker.store_keys import StoreKeys
from ..broker.values.code import FOR_ALL

ROLES = ("controller", "node", "proxy", "replica", "client")
FORMATS = ("commands", "definitions", "acl")


class BrokerRights(NamedTuple):
    """The three rights of RabbitMQ, each a regular expression over names of queues and exchanges."""

    configure: str
    write: str
    read: str


class StoreRights(NamedTuple):
    """The rights of Redis: keys to read, keys to write, and commands; and keys that may only be dropped, and lists that may only be
    appended to."""

    reads: frozenset[str]
    writes: frozenset[str]
    commands: tuple[str, ...]
    drops: frozenset[str] = frozenset()
    posts: frozenset[str] = frozenset()


def print_setup(namespace: str, what: str, vhost: str, env: Mapping[str, str]) -> str:
    """Returns the text that `--format` asks for. Raises BadValue if it needs passwords and the environment lacks one."""
    match what:
        case "definitions":
            return json.dumps(definitions(namespace, vhost, read_passwords(env)), indent=2)
        case "acl":
            return acl_file(namespace, read_passwords(env))
        case _:
            return commands(namespace, vhost)


def user_of(namespace: str, role: str) -> str:
    return f"{namespace}-{role}"


def read_passwords(env: Mapping[str, str]) -> dict[str, str]:
    """Returns the passwords by role, from MQSERVE_<ROLE>_PASSWORD or the file that MQSERVE_<ROLE>_PASSWORD_FILE names. It never makes one
    up."""
    passwords = {role: read_secret(env, f"{role.upper()}_PASSWORD") for role in ROLES}
    if missing := [f"MQSERVE_{role.upper()}_PASSWORD" for role, password in passwords.items() if not password]:
        raise BadValue(f"{', '.join(missing)} not set: this format holds hashes of passwords, and mqserve makes none up")
    return passwords


# RabbitMQ.


def broker_rights(namespace: str) -> dict[str, BrokerRights]:
    """Returns the rights by role. A node has none, since it handles no messages."""
    exchanges = (requests_exchange(namespace), jobs_exchange(namespace), later_exchange(namespace))
    sending, dead = "|".join(map(re.escape, exchanges)), re.escape(dead_exchange(namespace))
    backends = f"{re.escape(f'{namespace}.backend.')}.*|{re.escape(f'{namespace}.jobs.')}.*"
    waiting = f"{re.escape(endpoints_exchange(namespace))}|{re.escape(due_queue(namespace))}|{re.escape(f'{namespace}.later.')}[0-9]+"
    nothing = "^$"
    webhooks = rf"{re.escape(webhooks_queue(namespace))}(\.[a-z0-9]+)?"
    everything = f"{sending}|{dead}|{backends}|{waiting}|{webhooks}|{re.escape(dead_queue(namespace, ''))}.*"
    return {
        # amq.default: replies go to `reply_to` over it. It reaches every queue of the virtual host, so give that right to nobody else.
        "controller": BrokerRights(f"^({everything})$", rf"^({everything}|amq\.default)$", f"^({everything})$"),
        "proxy": BrokerRights(nothing, f"^({sending})$", nothing),
        "replica": BrokerRights(nothing, rf"^({sending}|{dead}|amq\.default)$", f"^({backends})$"),
        "client": BrokerRights(nothing, f"^({sending})$", nothing),
    }


def definitions(namespace: str, vhost: str, passwords: Mapping[str, str]) -> dict[str, Any]:
    """Returns the input of `rabbitmqctl import_definitions` or `load_definitions`."""
    rights = broker_rights(namespace)
    return {
        "vhosts": [{"name": vhost}],
        "users": [
            {
                "name": user_of(namespace, role),
                "password_hash": _rabbitmq_hash(passwords[role]),
                "hashing_algorithm": "rabbit_password_hashing_sha256",
                "tags": "",
            }
            for role in rights
        ],
        "permissions": [{"user": user_of(namespace, role), "vhost": vhost, **rights[role]._asdict()} for role in rights],
    }


def _rabbitmq_hash(password: str) -> str:
    salt = os.urandom(4)
    return base64.b64encode(salt + hashlib.sha256(salt + password.encode()).digest()).decode()


# Redis: see the table in broker/store_keys.py.

_CONNECTING = ("ping", "select", "time", "script|load")  # auth and hello need no right
_DOCUMENTS = ("get", "mget", "subscribe", "unsubscribe", "publish")
_BEATING = ("hset", "hdel")
_COUNTING = ("incr", "incrby", "del")
_TELLING = ("xadd", "pexpire")  # for cancellations
_CALLING = ("set", "evalsha", "eval", "blmpop", "xrange", "xinfo|stream", *_TELLING)  # for sending requests and waiting for results
_SENDING_JOBS = (  # and waiting for them, and ending them
    "exists", "getrange", "hgetall", "hincrby", "hmget", "hset", "hsetnx", "lrange", "ltrim", "rpush", "sadd", "setrange", "smembers",
    "zadd", "zrank", "zrem",
)  # fmt: skip
_RUNNING_JOBS = ("hdel", "hget", "pttl", "zrandmember")
_STREAMING = ("xlen", "xtrim")
_DROPPING = ("pexpire",)
_POSTING = ("pexpire", "rpush")
_CALLS = _CONNECTING + _DOCUMENTS + _CALLING + _SENDING_JOBS


class _Kinds:
    """Keys that the same roles may use."""

    def __init__(self, keys: StoreKeys) -> None:
        self.documents = {keys.desired, keys.observed}
        self.results = {keys.future("*"), keys.body("*")}
        self.streams = {keys.stream("*"), keys.owner("*")}
        self.feeds = {keys.feed("*")}
        self.losses = {keys.lost("*")}
        self.counts = {keys.start("*"), keys.attempts("*"), keys.redeliveries("*"), keys.claim("*")}
        self.jobs = {keys.job("*"), keys.message("*"), keys.events("*"), keys.waiters("*"), keys.followers("*"), keys.waiting("*")}
        self.lists = {keys.jobs, keys.ends}
        self.runs = {keys.lease("*"), keys.jobs}
        self.groups = {keys.group("*")}
        self.inboxes = {keys.inbox("*")}
        self._keys = keys

    def inboxes_of(self, role: str) -> set[str]:
        return {self._keys.inbox(f"{role}-*")}


def store_rights(namespace: str) -> dict[str, StoreRights]:
    """Returns the rights by role."""
    keys = StoreKeys(namespace)
    kinds = _Kinds(keys)
    documents, results = kinds.documents, kinds.results

    def rights(reads: set[str], writes: set[str], commands: tuple[str, ...]) -> StoreRights:
        return StoreRights(frozenset(reads), frozenset(writes), commands)

    def caller_rights(role: str, reads: set[str], writes: set[str], commands: tuple[str, ...]) -> StoreRights:
        """The reader of a streamed answer drops it at its end and tells the replica what it has taken, but writes no part of it. Who
        cancels a job tells the inboxes of those who wait for it, and counts it for its group. Ids of jobs can be added to their list, and
        not be read there."""
        both = results | kinds.jobs | kinds.groups | kinds.inboxes_of(role) | {keys.idempotent("*")}
        reads, writes = reads | both | kinds.streams | kinds.losses, writes | both | kinds.lists
        return StoreRights(frozenset(reads), frozenset(writes), commands, frozenset(kinds.streams), frozenset(kinds.feeds | kinds.inboxes))

    everything = {f"mqserve:{namespace}:*"}
    run = results | kinds.counts | kinds.streams | kinds.feeds | kinds.jobs | kinds.runs | kinds.groups | kinds.inboxes_of("replica")
    return {
        "controller": rights(
            everything, everything, (*_CALLS, *_BEATING, *_COUNTING, *_RUNNING_JOBS, "info", "persist", "xdel", "xread", "zrange")
        ),
        # After a loss of data it gives back the files of code, which are checked against their hashes wherever they are read.
        "node": rights(
            {*documents, keys.beats, keys.code("*")},
            {keys.beats, keys.cancelled, *kinds.losses, keys.code("*")},
            (*_CONNECTING, *_DOCUMENTS, *_BEATING, *_TELLING, "exists", "hgetall", "set"),
        ),
        "proxy": caller_rights(
            "proxy",
            {*documents, keys.start("*"), keys.code(f"{FOR_ALL}*"), keys.cancelled},
            {keys.beats, keys.cancelled},
            (*_CALLS, *_BEATING, "xread"),
        ),
        # A replica sends and waits through handles of its own; it may write to others' inboxes, but not read them.
        "replica": rights(
            run | documents | kinds.losses | {keys.code("*"), keys.instance, keys.ended, keys.cancelled},
            run | kinds.inboxes | kinds.lists | {keys.beats, keys.cancelled},
            (*_CALLS, *_BEATING, *_COUNTING, *_RUNNING_JOBS, *_STREAMING, "xread"),
        ),
        "client": caller_rights(
            "client",
            {*documents, keys.start("*"), keys.instance, keys.ended, keys.beats, keys.firings},
            {keys.desired, keys.code("*"), keys.cancelled},
            _CALLS,
        ),
    }


def acl_rules(namespace: str, role: str) -> list[str]:
    """Returns the rules of one user, without the password."""
    rights = store_rights(namespace)[role]
    both = rights.reads & rights.writes
    return [
        "resetchannels",
        f"&{StoreKeys(namespace).changed}",
        "resetkeys",
        *(f"%RW~{key}" for key in sorted(both)),
        *(f"%R~{key}" for key in sorted(rights.reads - both)),
        *(f"%W~{key}" for key in sorted(rights.writes - both)),
        "-@all",
        *(f"+{command}" for command in sorted(set(rights.commands))),
        *_selector(rights.drops, _DROPPING),
        *_selector(rights.posts, _POSTING),
    ]


def _selector(keys: frozenset[str], commands: tuple[str, ...]) -> list[str]:
    """The rule that allows these commands, and no others, to write these keys."""
    rules = [*(f"%W~{key}" for key in sorted(keys)), *(f"+{command}" for command in sorted(commands))]
    return [f"({' '.join(rules)})"] if keys else []


def acl_file(namespace: str, passwords: Mapping[str, str]) -> str:
    """Returns the content of Redis's `aclfile`."""
    lines = ["user default off"]
    for role in ROLES:
        digest = hashlib.sha256(passwords[role].encode()).hexdigest()
        lines.append(" ".join(["user", user_of(namespace, role), "on", f"#{digest}", *acl_rules(namespace, role)]))
    return "\n".join(lines)


# Both, as shell commands.


def commands(namespace: str, vhost: str) -> str:
    """Returns shell commands that contain no password: the shell has them in its environment, and passes them on by pipes."""
    lines = [f"# Each password is read from MQSERVE_<ROLE>_PASSWORD of the shell that runs this. RabbitMQ, virtual host {vhost}:"]
    if vhost != "/":  # every RabbitMQ has the virtual host /
        lines.append(shlex.join(["rabbitmqctl", "add_vhost", vhost]))
    for role, rights in broker_rights(namespace).items():
        user = user_of(namespace, role)
        lines.append(f"printf %s {_password(role)} | rabbitmqctl add_user {user}")
        lines.append(shlex.join(["rabbitmqctl", "set_permissions", "--vhost", vhost, user, *rights]))
    lines.append("# rabbitmqctl delete_user guest    (once nothing else uses it)")
    lines.append("# Redis 7; keep it by `redis-cli ACL SAVE` where an aclfile is configured:")
    for role in ROLES:
        rules = shlex.join(["ACL", "SETUSER", user_of(namespace, role), "reset", "on", *acl_rules(namespace, role)])
        lines.append(f"printf '>%s' {_password(role)} | redis-cli -x {rules}")
    lines.append("# redis-cli ACL SETUSER default off    (once nothing else uses it)")
    return "\n".join(lines)


def _password(role: str) -> str:
    return f'"${{MQSERVE_{role.upper()}_PASSWORD:?}}"'
