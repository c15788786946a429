"""Post-training quantisation: calibration samples, recipes, quantised checkpoints."""
