"""mycoSwarm: a router that hands whole requests to the best machine's Ollama. Attached to, never started."""
