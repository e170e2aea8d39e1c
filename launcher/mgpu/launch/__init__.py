"""The only code that starts, watches and stops programs."""
