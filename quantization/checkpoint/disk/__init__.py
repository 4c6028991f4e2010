"""Files whole or not at all, JSON, safetensors: what knows disks and nothing of layers."""
