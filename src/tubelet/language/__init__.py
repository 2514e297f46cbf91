"""Video and text: lists of captions and questions, tokenizers, causal language models with a video as prefix, metrics.

Needs the packages of `pip install tubelet[language]`.
"""
