"""Per-sample gradients of a model in training, layer by layer, in one backward pass."""
