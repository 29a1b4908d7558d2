"""What is learnt: batches, losses, metrics. A task knows its model's module; training neither."""
