"""What trained models say of texts: batches of like length, in order, one program for each shape."""
