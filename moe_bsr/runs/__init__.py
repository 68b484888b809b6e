"""What a run leaves on disk, and how a trained model comes back from it."""
