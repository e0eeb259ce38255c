"""TensorRT and TensorRT for RTX behind the `Backend` protocol."""
