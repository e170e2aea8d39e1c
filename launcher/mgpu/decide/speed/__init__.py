"""How fast a placement will be: a physical model with few constants. Predictions, unless this rig was measured.

`forecast` is cheap, for the search: one user's tokens per second, and all users' together. `complete` adds what only
the chosen placement needs: prompts, and the wait for the first token. `unit_seconds` is what each unit costs on a card.
docs/speed.md says how, and how good it is; benchmarks/fit_speed.py how the constants were found.
"""

from mgpu.decide.speed.decode import host_seconds_per_token, unit_seconds
from mgpu.decide.speed.forecasts import complete, forecast

__all__ = ["complete", "forecast", "host_seconds_per_token", "unit_seconds"]
