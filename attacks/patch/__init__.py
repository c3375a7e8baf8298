"""The adversarial patch: learnt over random placements, printed, placed in photographs, measured on unseen images."""
