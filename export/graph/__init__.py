"""ONNX graphs of the network: export, opset 17, int8 weights, fp8 matmuls."""
