"""Frames to come: models that predict them, how far they are from the truth, and pictures of both."""
