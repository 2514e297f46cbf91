"""Loss terms that several objectives share."""
