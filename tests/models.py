"""The tiny models that peftlight ships for its users' tests are those of our own."""

from peftlight.testing.models import CLASSES, CONVOLUTIONAL, MODELS, VOCABULARY, inputs_for, llama, make

__all__ = ["CLASSES", "CONVOLUTIONAL", "MODELS", "VOCABULARY", "inputs_for", "llama", "make"]
