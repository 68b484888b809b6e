"""Evaluation of trained models: accuracy, calibration, tokens kept, experts used, ablations, rejection scores."""
