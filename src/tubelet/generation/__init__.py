"""Future-frame prediction: models, baselines, metrics and figures."""
