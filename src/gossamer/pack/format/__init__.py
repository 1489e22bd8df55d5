"""The bytes of a file: tensors, sections, the container."""
