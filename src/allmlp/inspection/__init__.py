"""A model -> plots and measures of its weights, and of what one image excites; trains nothing."""
