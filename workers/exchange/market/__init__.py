"""The market: instruments, prices, books and trades. Pure: time and chance are passed in."""
