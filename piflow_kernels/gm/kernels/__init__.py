"""Device code of the GM rollout (DESIGN 2.2). No allocation, no autograd; launched by `piflow_kernels.gm.launch`."""
