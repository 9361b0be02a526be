"""A foreign program that publishes requests by AMQP, persistent and confirmed: `publisher.py EXCHANGE BACKEND IN_FLIGHT SECONDS`.

It imports nothing of mqserve. So many requests are always under way; each ends with its answer on the publisher's own queue. Prints JSON:
for each request the seconds until its confirm and until its answer.
"""

import asyncio
import json
import os
import sys
import time

import aiormq
from aiormq.abc import DeliveredMessage
from pamqp.commands import Basic

ANSWER_BUDGET_S = 30.0
RUN = os.getpid()  # a message_id that has a result already is not run again


class Publisher:
    def __init__(self, channel: aiormq.abc.AbstractChannel, exchange: str, backend: str, answers: str) -> None:
        self._channel = channel
        self._exchange = exchange
        self._backend = backend
        self._answers = answers
        self._waiting: dict[str, asyncio.Future[object]] = {}
        self._published = 0
        self.confirmed_s: list[float] = []
        self.answered_s: list[float] = []

    async def answered(self, message: DeliveredMessage) -> None:
        properties = message.header.properties
        assert (properties.headers or {})["mq-status"] == 200, properties.headers
        self._waiting.pop(str(properties.correlation_id)).set_result(None)

    async def publish_until(self, end: float) -> None:
        while (began := time.perf_counter()) < end:
            self._published += 1
            number = str(self._published)
            answer = self._waiting[number] = asyncio.get_running_loop().create_future()
            properties = Basic.Properties(
                content_type="text/plain", delivery_mode=2, message_id=f"{RUN}-{number}", reply_to=self._answers, correlation_id=number
            )
            confirm = await self._channel.basic_publish(
                b"x", exchange=self._exchange, routing_key=self._backend, properties=properties, mandatory=True
            )
            assert isinstance(confirm, Basic.Ack), confirm
            self.confirmed_s.append(time.perf_counter() - began)
            await asyncio.wait_for(answer, ANSWER_BUDGET_S)
            self.answered_s.append(time.perf_counter() - began)


async def main() -> None:
    exchange, backend, in_flight, seconds = sys.argv[1:]
    connection = await aiormq.connect(os.environ["MQSERVE_BROKER_URL"])
    channel = await connection.channel(publisher_confirms=True)
    answers = (await channel.queue_declare("", exclusive=True)).queue
    assert answers
    publisher = Publisher(channel, exchange, backend, answers)
    await channel.basic_consume(answers, publisher.answered, no_ack=True)
    end = time.perf_counter() + float(seconds)
    await asyncio.gather(*(publisher.publish_until(end) for _ in range(int(in_flight))))
    await connection.close()
    print(json.dumps({"confirmed_s": publisher.confirmed_s, "answered_s": publisher.answered_s}))


if __name__ == "__main__":
    asyncio.run(main())
