"""What runs the stages of a run: a Ray cluster (`ray`) or this one process (`local`), chosen by cluster.kind."""
