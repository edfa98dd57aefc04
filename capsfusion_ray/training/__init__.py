"""Train a fusion model on caption triples, fine-tune one, label captions for it, and evaluate it against references."""
