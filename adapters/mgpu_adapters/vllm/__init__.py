"""vLLM: safetensors directories on one CUDA card, or pipelined over several."""
