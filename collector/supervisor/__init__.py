"""The process of `collector run`: starts, watches and restarts the workers, and answers on the control endpoint."""
