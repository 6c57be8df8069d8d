"""The time limit of every wait in the tests."""

PATIENCE_SECONDS = 120.0  # for what is to come at once: only a hang reaches it, on however slow or busy a machine
