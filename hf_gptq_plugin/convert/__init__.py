"""What a checkpoint folder holds, and its quantized weights in the layouts of other readers."""
