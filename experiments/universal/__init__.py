"""Universal perturbations and patches measured on a real model: records, figure, and the page that quotes them."""
