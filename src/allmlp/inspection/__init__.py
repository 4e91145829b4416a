"""A model -> pictures and numbers of its weights, and of what one image excites; trains nothing."""
