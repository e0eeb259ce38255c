"""Build TensorRT and TensorRT for RTX engines."""
