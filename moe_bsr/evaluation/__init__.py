"""What a trained model does: its accuracy, the tokens it keeps, the experts it uses."""
