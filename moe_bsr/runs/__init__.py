"""Files of a run: writing them during training, and loading a trained model from them."""
