"""What every part may use: files, provenance, progress, memory, the bootstrap."""
