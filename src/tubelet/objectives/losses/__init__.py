"""Loss terms, and modules that belong to them, that several objectives share."""
