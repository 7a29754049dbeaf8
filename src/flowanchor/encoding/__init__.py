"""From images to files of latents: sources, the released crop, and shards that are written once."""
