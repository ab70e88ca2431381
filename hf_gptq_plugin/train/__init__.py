"""What learns on a quantized base."""
