"""The store on Redis: the client, the scripts, results on their way, and whether it takes what is written."""
