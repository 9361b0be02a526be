"""Every key in the store, in one place. `<ns>` is the namespace; the braces are literal hash tags.

| key                          | type   | writer               | reader            | expiry                    |
|------------------------------|--------|----------------------|-------------------|---------------------------|
| `mqserve:<ns>:future:{id}`   | string | replica, or the process that finds it late; once (NX) | waiting processes | RESULT_TTL_S |
| `mqserve:<ns>:start:{id}`    | string | replica; empty: not started | waiting process, replicas | deadline + 60 s, or one day |
| `mqserve:<ns>:attempts:{id}` | string, a JSON list | replica, on redelivery | replica          | one day                   |
| `mqserve:<ns>:redeliveries:{id}` | counter | replica, on redelivery | replica              | one day                   |
| `mqserve:<ns>:claim:{id}`    | string | replica, after a change of the queue's generation | replica | one day          |
| `mqserve:<ns>:body:{id}`     | string | sender: a body by reference | replica      | the request's deadline + 60 s |
| `mqserve:<ns>:body:{id.result}` | string | replica: a large result | waiting processes | RESULT_TTL_S, or when a proxy has read it |
| `mqserve:<ns>:stream:{id}`   | stream | replica: frames of an answer | waiting processes | STREAM_TTL_S, or when its reader has all |
| `mqserve:<ns>:owner:{id}`    | string | replica: which run writes the stream | replicas, waiting processes | as the stream |
| `mqserve:<ns>:lost:<replica>` | string | its node, when it has died | readers of streams | LOST_TTL_S |
| `mqserve:<ns>:feed:<replica>` | list  | readers: credit; proxies: WebSockets | that replica | INBOX_TTL_S, renewed by each write |
| `mqserve:<ns>:inbox:<pid>`   | list   | replicas; whoever ends a job | that process | INBOX_TTL_S, renewed by each write |
| `mqserve:<ns>:code:<sha256>` | string: a backend's code, manifest, chunk | clients, nodes | replicas, nodes | as the next |
| `mqserve:<ns>:code:all.<sha256>` | string: convertor, middlewares | clients | proxies, replicas | CODE_TTL_S; none while deployed |
| `mqserve:<ns>:desired`       | string | clients, by compare-and-set | all        | none                      |
| `mqserve:<ns>:observed`      | string | leading controller   | all               | none                      |
| `mqserve:<ns>:firings`       | string: firings of schedules | leading controller | the same, clients | none; FIRINGS_TTL_S after an end |
| `mqserve:<ns>:instance`      | string | starter, controller  | starters, clients | none: it is a lease       |
| `mqserve:<ns>:leader`        | string | controllers          | controllers       | none: lapses after LEADER_TTL_S |
| `mqserve:<ns>:ended`         | string | the process that clears an instance: its id | controllers, clients | ENDED_TTL_S |
| `mqserve:<ns>:beats`         | hash   | nodes, proxies, replicas: one field each | controller | fields dropped by the leader |
| `mqserve:<ns>:cancelled`     | stream | senders, nodes, controller | replicas, proxies | LOG_TTL_S, renewed by each write |
| `mqserve:<ns>:changed`       | pub/sub channel | writers of documents | watchers | -                         |

Those of jobs. Until a job ends, they live for UNENDED_TTL_S:

| key                          | type   | writer               | reader            | expiry after the end      |
|------------------------------|--------|----------------------|-------------------|---------------------------|
| `mqserve:<ns>:job:{id}`      | hash   | sender, replica, whoever ends it | all   | twice that of the result  |
| `mqserve:<ns>:message:{id}`  | string | sender               | sender of a retry | as the result, after a success MESSAGE_TTL_S |
| `mqserve:<ns>:events:{id}`   | list of KEPT_EVENTS | as the record | followers | as the result             |
| `mqserve:<ns>:lease:{id}`    | string: token of a run | replica | replicas       | LEASE_MS, renewed every RENEW_EVERY_S |
| `mqserve:<ns>:waiters:{id}`  | set of inboxes | waiting processes | who ends it  | WAIT_TTL_S, renewed       |
| `mqserve:<ns>:followers:{id}` | set of inboxes | followers   | writers of events | WAIT_TTL_S, renewed       |
| `mqserve:<ns>:waiting:<backend>` | sorted set: ids that have not begun | sender, replica, who ends it | who asks for a place | removed |
| `mqserve:<ns>:jobs`          | sorted set: ids by time of creation | sender, replica | operators | removed some time after the record |
| `mqserve:<ns>:group:{id}`    | hash: facts, counts of ends | sender, who ends jobs | clients, controllers | none: UNENDED_TTL_S, renewed |
| `mqserve:<ns>:group:{id.ends}` | string: a byte for each member's end | who ends jobs | clients, controllers | as the counts |
| `mqserve:<ns>:idempotent:<sha256>` | string: which request has the key | senders (NX) | senders | KEY_TTL_S, from its sending |
| `mqserve:<ns>:ends`          | stream: ends from which something follows | who ends it | leading controller | removed once that is sent |
"""

from __future__ import annotations

RESULT_TTL_S = 600
INBOX_TTL_S = 120
STREAM_TTL_S = 600
LOST_TTL_S = 30 * 60  # longer than any run
CODE_TTL_S = 3600  # enough time to commit a deployment, or to roll it back
LEADER_TTL_S = 6
ENDED_TTL_S = 24 * 3600
FIRINGS_TTL_S = 31 * 24 * 3600  # those of a schedule that fires once a month are made up for, too
LOG_TTL_S = 30 * 60
LOG_LENGTH = 10_000


class StoreKeys:
    """The keys of one namespace."""

    def __init__(self, namespace: str) -> None:
        self._root = f"mqserve:{namespace}"
        self.desired = f"{self._root}:desired"
        self.observed = f"{self._root}:observed"
        self.firings = f"{self._root}:firings"
        self.instance = f"{self._root}:instance"
        self.leader = f"{self._root}:leader"
        self.ended = f"{self._root}:ended"
        self.beats = f"{self._root}:beats"
        self.cancelled = f"{self._root}:cancelled"
        self.jobs = f"{self._root}:jobs"
        self.ends = f"{self._root}:ends"
        self.changed = f"{self._root}:changed"

    def __repr__(self) -> str:
        return f"<StoreKeys {self._root}>"

    def future(self, future_id: str) -> str:
        return f"{self._root}:future:{{{future_id}}}"

    def start(self, future_id: str) -> str:
        return f"{self._root}:start:{{{future_id}}}"

    def claim(self, future_id: str) -> str:
        return f"{self._root}:claim:{{{future_id}}}"

    def attempts(self, future_id: str) -> str:
        return f"{self._root}:attempts:{{{future_id}}}"

    def redeliveries(self, future_id: str) -> str:
        return f"{self._root}:redeliveries:{{{future_id}}}"

    def of_runs(self, future_id: str) -> tuple[str, ...]:
        """All keys about a request's runs, the result included. Without them the request runs as if it had never run."""
        kinds = (self.future, self.start, self.claim, self.attempts, self.redeliveries, self.job, self.lease, self.events)
        return tuple(key(future_id) for key in kinds)

    def group(self, group_id: str) -> str:
        return f"{self._root}:group:{{{group_id}}}"

    def group_ends(self, group_id: str) -> str:
        return self.group(f"{group_id}.ends")

    def body(self, future_id: str) -> str:
        return f"{self._root}:body:{{{future_id}}}"

    def result_body(self, future_id: str) -> str:
        """The key of a large result's body. It is always made from the id: a key named in a message or a result may come from anybody."""
        return self.body(f"{future_id}.result")

    def stream(self, future_id: str) -> str:
        return f"{self._root}:stream:{{{future_id}}}"

    def owner(self, future_id: str) -> str:
        return f"{self._root}:owner:{{{future_id}}}"

    def job(self, future_id: str) -> str:
        return f"{self._root}:job:{{{future_id}}}"

    def message(self, future_id: str) -> str:
        return f"{self._root}:message:{{{future_id}}}"

    def lease(self, future_id: str) -> str:
        return f"{self._root}:lease:{{{future_id}}}"

    def events(self, future_id: str) -> str:
        return f"{self._root}:events:{{{future_id}}}"

    def waiters(self, future_id: str) -> str:
        return f"{self._root}:waiters:{{{future_id}}}"

    def followers(self, future_id: str) -> str:
        return f"{self._root}:followers:{{{future_id}}}"

    def idempotent(self, scope: str) -> str:
        return f"{self._root}:idempotent:{scope}"

    def waiting(self, backend: str) -> str:
        return f"{self._root}:waiting:{backend}"

    def feed(self, replica_id: str) -> str:
        return f"{self._root}:feed:{replica_id}"

    def lost(self, replica_id: str) -> str:
        return f"{self._root}:lost:{replica_id}"

    def inbox(self, process_id: str) -> str:
        return f"{self._root}:inbox:{process_id}"

    def code(self, sha256: str) -> str:
        return f"{self._root}:code:{sha256}"
