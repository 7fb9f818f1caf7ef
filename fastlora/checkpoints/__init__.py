"""Checkpoints on disk, streamed a tensor at a time: merged, exported and verified without building the model."""
