"""Plans, rigs and models as text and as JSON."""
