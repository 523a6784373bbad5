"""From a torch program to model.onnx and model.json."""
