"""What a quantized tensor and a checkpoint are. Needs torch and safetensors only."""
