"""Images with captions: tables, sources, pixels, datasets, and the embedded demo set."""
