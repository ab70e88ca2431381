"""What runs a quantized model: the ops, and the modules that call them."""
