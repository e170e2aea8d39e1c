"""The checks: each is a pure function of the facts, and says nothing where it does not apply."""
