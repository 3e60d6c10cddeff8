"""Training: one pure step a stage, and the loop that repeats it."""
