"""Data modules: `Batch`es for training, `ImageSet`s for evaluation."""
