"""Front ends: ONNX files, torch.export programs and Relax modules become a Model."""
