"""Training examples: sources, images, captions, token ids, and the loader that batches them."""
