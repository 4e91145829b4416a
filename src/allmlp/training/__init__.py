"""A config -> a run folder."""
