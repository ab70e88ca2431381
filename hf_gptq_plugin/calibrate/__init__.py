"""From a model and text to a quantized model."""
