"""A model and data -> numbers; trains nothing."""
