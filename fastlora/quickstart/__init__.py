"""The main job on real input in half a minute: adapt, save, reload, merge and use a small model."""
