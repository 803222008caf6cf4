"""GMFlow policy: a Gaussian mixture per latent pixel."""
