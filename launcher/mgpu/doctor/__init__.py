"""`mgpu doctor`: what an expert would look at on this machine before blaming a model. Facts, pure checks, a screen."""
