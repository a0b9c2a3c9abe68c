"""The autotuner: what is measured, how, and in which order."""
