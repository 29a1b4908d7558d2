"""What trained models say of texts: in batches of like length, in order."""
