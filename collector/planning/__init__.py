"""What a configuration comes to: instruments found, channels spread over connections, the exchange's limits."""
