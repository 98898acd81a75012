"""quantize(): from a float model to one that trains quantized."""
