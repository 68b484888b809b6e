"""Studies: compare configurations, methods and plain timm at equal numbers of images or equal minutes."""
