"""Pictures and pages of how a run uses experts and patches."""
