"""The queue on RabbitMQ: connections and channels, publishing, consuming, topology, dead letters."""
