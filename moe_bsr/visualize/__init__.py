"""Views: what a run did with experts and patches, as statistics, pictures and pages."""
