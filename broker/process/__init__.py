"""What any process of ours is made of: event loops, signals, forks, sockets, TLS, log lines."""
