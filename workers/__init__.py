"""The kinds of worker process that the supervisor can run; one folder a kind."""
