"""What a message costs: a load server, the real worker and three yardsticks, measured from outside."""
