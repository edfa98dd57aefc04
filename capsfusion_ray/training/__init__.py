"""Fine-tune or train a fusion model on caption triples. May import torch and ray; nothing below this layer imports it."""
