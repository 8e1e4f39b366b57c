"""How a bundle is served: over HTTP, on Ray, in Triton. Everything that computes is in ``runtime``."""
