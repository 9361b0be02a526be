"""Celery with RabbitMQ and results in Redis: python server.py starts its worker; client.py imports the task."""

import os

from celery import Celery

app = Celery("peer_celery", broker=os.environ["PEER_BROKER_URL"], backend=os.environ["PEER_STORE_URL"])
app.conf.task_default_queue = "peer-celery"
app.conf.broker_connection_retry_on_startup = True


@app.task(name="noop")
def noop():
    return "ok"


if __name__ == "__main__":
    app.worker_main(["worker", "--concurrency=1", "--without-gossip", "--without-mingle", "--loglevel=warning"])
