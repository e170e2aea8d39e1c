"""ExLlamaV2 and ExLlamaV3: their memory, and the `gpu_split` that makes their loaders do what is planned."""
