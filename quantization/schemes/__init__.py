"""How a weight matrix is stored in few bits: scheme, grids, codebooks, scales, packed matrix."""
