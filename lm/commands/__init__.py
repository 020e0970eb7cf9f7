"""What each command of `lm` does, as functions that print."""
