"""The whole decode pipeline of a layer in one launch, for batches too small to hide five."""
