"""Transfer between models on CIFAR-10, and substitutes of a model that only answers queries."""
