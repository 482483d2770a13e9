"""Training: data, loss, optimiser, the DeepSpeed loop, and the embedded data set."""
