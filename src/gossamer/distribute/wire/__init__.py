"""The bytes of a message between workers."""
