"""Memory, operations, communication and time of a run: arithmetic over its configuration, without torch."""
