"""The model: a pretrained backbone under a plan, heads for the tasks, and what its blocks drop, route and save."""
