"""Weight bundles: a manifest, verified safetensors, and where to find them."""
