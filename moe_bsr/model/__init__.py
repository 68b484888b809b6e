"""The model: a pretrained backbone, a plan for its blocks, and one head per task."""
