"""Tubelet: self-supervised pretraining of video encoders."""

__version__ = "0.1.0"
