"""Write the network as ONNX graphs."""
