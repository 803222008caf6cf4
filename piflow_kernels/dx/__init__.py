"""DX policy: velocities on a grid of times, or a polynomial in time."""
