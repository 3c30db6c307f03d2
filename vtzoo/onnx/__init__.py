"""A network as an ONNX file: converting, pixels in the graph, fewer bits, running, verifying, and what the file says of itself."""
