"""Reads deliveries: which sender is believed, and which keys and queues a message may name."""

from __future__ import annotations

from ..broker.queue import Delivery
from ..broker.settings import Settings
from .admission import Admission
from .stages import Job
from .trust import SenderTrust


class Reading:
    """Reads the deliveries of one replica."""

    def __init__(self, settings: Settings, admission: Admission) -> None:
        self._trust = SenderTrust(settings)
        self._admission = admission

    def __repr__(self) -> str:
        return f"<Reading with {self._trust!r}>"

    def demand_seals(self, demanded: bool) -> None:
        """Sets whether a header without a seal is refused. Has no effect without a key to check seals with."""
        self._trust.demands_seals = demanded

    def read(self, job: Job, delivery: Delivery) -> None:
        """Sets the job's envelope, without its header if that is not believed. Raises BadEnvelope for a message to refuse."""
        envelope = delivery.envelope()
        if envelope.reply_to:
            self._admission.check_reply_to(envelope)
        try:
            self._trust.check_header(envelope)
        except Exception:
            job.envelope = envelope.without_header()
            raise
        self._admission.check_keys(envelope)
        job.envelope = envelope
        self._trust.check_pickle(envelope)
