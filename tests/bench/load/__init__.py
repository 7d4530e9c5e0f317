"""What loads the measured program and listens to it: each a process of its own."""
