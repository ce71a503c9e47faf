"""Exported models on ONNX Runtime, without torch: the folder, the cache and the model of an export (see `nanochat.export`)."""
