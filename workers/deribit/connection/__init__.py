"""The WebSocket: connect, bootstrap, subscribe, stay connected."""
