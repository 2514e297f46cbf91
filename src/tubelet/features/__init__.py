"""Features of whole video collections on disk: extraction, reading, nearest neighbors and clusters."""
