"""Ways from a matrix to its codes, and what they know of a layer's inputs."""
