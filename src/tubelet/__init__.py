"""Tubelet: self-supervised pretraining of video encoders."""

__version__ = "0.2.0.dev0"
