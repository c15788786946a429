"""GPU kernels, each beside its slow oracle."""
