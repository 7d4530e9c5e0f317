"""The parts of the bench: each a module that lists its measurements, by label, in full or as a smoke run."""
